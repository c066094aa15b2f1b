"""qcow, version 1. Reference: https://gitlab.com/qemu-project/qemu/-/blob/master/block/qcow.c

    layout.py      structures; the header, parsed and validated
    mapping.py     guest offset → extents, over cached tables
    changes.py     what changes an image
    driver.py      the driver
    create.py      a new image; another backing file's name
    check.py       errors and leaks
"""
