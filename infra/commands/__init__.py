"""What people run: deploy, destroy, cost."""
