"""Find what to remove by optimisation or in closed form; every fit returns a value and changes no weight."""

from repedit.fit.learned import gates

__all__ = ["gates"]
