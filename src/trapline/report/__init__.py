"""Result documents into text, JSON, JSON Lines and SARIF; reads nothing but documents."""
