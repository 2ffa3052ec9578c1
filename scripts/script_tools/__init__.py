"""What several scripts share: figures of a scored checkpoint, and running the program itself."""
