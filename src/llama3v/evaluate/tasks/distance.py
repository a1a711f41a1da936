"""The edit distance that DocVQA and MathVista score by."""


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of a character."""
    if len(first) > len(second):
        first, second = second, first
    above = list(range(len(first) + 1))
    for row, character in enumerate(second, 1):
        current = [row]
        for column, other in enumerate(first):
            if character == other:
                current.append(above[column])
            else:
                current.append(1 + min(above[column], above[column + 1], current[column]))
        above = current
    return above[-1]
