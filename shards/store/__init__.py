"""How a cache's columns and views lie in files: zarr v3 and webdataset tars behind one protocol, read at the speed of the disk."""
