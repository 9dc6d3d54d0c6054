from ranks import no_ranks_afterwards

__all__ = ["no_ranks_afterwards"]
