"""What a report says: one file a document, which turns it into blocks."""
