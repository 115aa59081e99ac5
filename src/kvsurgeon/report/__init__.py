"""What was found and measured, for people: tables and plots."""
