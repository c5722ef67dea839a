"""A step's gradient, loss and buffers, put together of what its micro-batches leave in one process or several."""
