"""Dataset folders on disk, the chat layout, packing, and host batches of images and of rows."""
