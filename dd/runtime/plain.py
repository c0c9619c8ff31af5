"""Text that comes from files, made fit for a terminal."""


def plain(text: str) -> str:
    """The text without what a terminal would obey: such characters are shown as escapes.

    A file may hold escape sequences that move the cursor or set the window's title, and characters
    that reverse the direction of what follows. Line ends and tabs stay.
    """
    return "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
