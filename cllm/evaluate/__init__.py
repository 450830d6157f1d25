"""How good is it: answers and losses against references, multiple choice, votes, and the report
that shows them.
"""
