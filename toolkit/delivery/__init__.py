"""What goes to a device, and how it becomes current there."""
