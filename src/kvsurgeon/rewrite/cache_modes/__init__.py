"""How a cache is passed from call to call: dynamic, static, or new tokens only."""
