/* How the write log was looked at first: bit by bit, a bit a sector. Prints how many extents there are, and how
 * long that took.
 *
 *     original_scan BLOCKS SECTORS FILE     FILE holds a bitmap of BLOCKS blocks of so many sectors, the first in
 *                                           the lowest bit of the first byte
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now_s(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

static int is_dirty(const uint8_t *bits, uint64_t at)
{
    return bits[at >> 3] >> (at & 7) & 1;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    uint64_t blocks = strtoull(argv[1], NULL, 10), per_block = strtoull(argv[2], NULL, 10);
    uint64_t sectors = blocks * per_block, extents = 0, longest = 0;
    size_t size = (blocks + 7) / 8;
    uint8_t *coarse = malloc(size), *bits = calloc(sectors / 8 + 1, 1);
    FILE *file = fopen(argv[3], "rb");
    if (!coarse || !bits || !file || fread(coarse, 1, size, file) != size)
        return 1;
    for (uint64_t sector = 0; sector < sectors; sector++)
        bits[sector >> 3] |= is_dirty(coarse, sector / per_block) << (sector & 7);
    double start_s = now_s();
    for (uint64_t sector = 0; sector < sectors;) {
        if (!is_dirty(bits, sector)) {
            sector++;
            continue;
        }
        uint64_t first = sector;
        while (sector < sectors && is_dirty(bits, sector))
            sector++;
        extents++;
        if (sector - first > longest)
            longest = sector - first;
    }
    printf("%llu %.6f %llu\n", (unsigned long long)extents, now_s() - start_s, (unsigned long long)longest);
    return 0;
}
