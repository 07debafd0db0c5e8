"""What runs train on: corpora, their tokens, and rows of files and data sets."""
