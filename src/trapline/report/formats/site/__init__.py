"""What the HTML page is made of beside its text: `page.css` and `page.js`, shipped as they are."""
