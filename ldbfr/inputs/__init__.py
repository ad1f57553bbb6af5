"""Images in folders, archives, tables and lists, on a disk or in a bucket: what is there, and its bytes."""
