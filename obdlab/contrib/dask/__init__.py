"""Work spread over the workers of a Dask scheduler (the extra ``mass``)."""
