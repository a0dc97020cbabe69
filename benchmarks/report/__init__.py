"""Records as people read them: what a record holds and whether one is whole, tables of the pages, pictures.

Nothing here measures.
"""
