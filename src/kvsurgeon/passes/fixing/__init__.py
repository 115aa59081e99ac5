"""What fixing shapes is made of: the interface in numbers, and what follows from them."""
