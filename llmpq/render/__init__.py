"""What people read: the console, progress, and tables of what the commands found."""
