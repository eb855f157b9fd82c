"""What `doctor` is made of: what lies under home, a function for each check, what can be done."""
