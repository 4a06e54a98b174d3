"""Documents in, token shards out, and the order in which training reads them."""
