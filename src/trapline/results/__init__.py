"""Result documents, value types and errors that all layers share; imports nothing of trapline."""
