"""Data sets for training, made of folders and archives of images."""
