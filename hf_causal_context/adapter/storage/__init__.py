"""An adapter's files, checked: the worst that a stranger's can do is to be refused."""
