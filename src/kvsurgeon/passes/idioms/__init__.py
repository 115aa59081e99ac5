"""How a cache travels through a call: three idioms, one small class each, and what they are made of."""
