"""Speed and size of the proxy, side by side with its peers on one machine, in one run. No part of the distribution."""
