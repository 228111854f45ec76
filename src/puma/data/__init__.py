"""Images: sources in their file formats, pools of several sources, and the batches drawn from them."""
