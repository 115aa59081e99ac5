"""Run models with stored outputs by an independent verifier that shares no code with kvsurgeon."""
