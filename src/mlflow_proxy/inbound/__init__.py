"""The callers' side: connections, and the requests and answers on them."""
