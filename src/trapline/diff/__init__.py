"""What is different between two results of one command, the compiler's doing told apart."""
