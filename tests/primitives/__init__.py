"""The primitives of csrc's arithmetic one by one: their contracts, read from the headers, and what holds them."""
