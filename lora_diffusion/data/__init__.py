"""From a folder of files to batches that continue exactly where they stopped."""
