"""What is AWS: SigV4, credentials, presigned URLs."""
