"""Pages outside the block pool: kept when a turn ends, copied back when somebody asks for them."""
