"""Episodes: stages, agents, budgets."""
