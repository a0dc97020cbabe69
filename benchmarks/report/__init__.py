"""Records as people read them: what one holds and whether it is whole, tables of the pages, pictures."""
