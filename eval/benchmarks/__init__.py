"""What is particular to each benchmark."""
