"""What the proxy tells about itself: log lines."""
