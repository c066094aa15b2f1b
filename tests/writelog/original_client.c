/* A client of the write log that knows only the original interface: 20-byte messages with all parameters zero,
 * the 8 MiB region, and the extent ring with the arithmetic of Xen's ring.h.
 *
 * original_client SOCKET
 *   shmp, print the cookie; peek, print the ranges; getw, print the ranges; read each range through the ring and
 *   print a checksum of its data; clrw; peek again, print the ranges. Exit status 0, or a line on stderr and 1.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { REGION = 8 * 1024 * 1024, PAGE = 4096, SECTOR = 512, SHMP_REPLY = 256, STATUS = 4 };

struct control_message { char command[4]; char params[16]; };
struct range { uint64_t sector; uint32_t count; };
struct extent { uint64_t sector; uint32_t count; uint32_t offset; };

struct shared_ring {
    uint32_t req_prod, req_event, rsp_prod, rsp_event;
    uint8_t pad[48];
    struct extent slot[];
};

_Static_assert(sizeof(struct control_message) == 20, "message");
_Static_assert(sizeof(struct range) == 16, "range");
_Static_assert(sizeof(struct extent) == 16, "extent");
_Static_assert(sizeof(struct shared_ring) == 64, "ring header");

/* The slots that fit the page, rounded down to a power of two, as ring.h does it. */
static uint32_t ring_size(void)
{
    uint32_t fit = (PAGE - sizeof(struct shared_ring)) / sizeof(struct extent), size = 1;
    while (size * 2 <= fit)
        size *= 2;
    return size;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void send_all(int fd, const char *command)
{
    struct control_message message;
    memset(&message, 0, sizeof message);
    memcpy(message.command, command, 4);
    if (write(fd, &message, sizeof message) != sizeof message)
        die("write");
}

static void receive_all(int fd, void *buffer, size_t length)
{
    char *at = buffer;
    while (length) {
        ssize_t got = read(fd, at, length);
        if (got <= 0)
            die("read");
        at += got;
        length -= got;
    }
}

static void ask(int fd, const char *command)
{
    char reply[STATUS];
    send_all(fd, command);
    receive_all(fd, reply, STATUS);
    if (memcmp(reply, "done", STATUS)) {
        fprintf(stderr, "%s: reply %.4s\n", command, reply);
        exit(1);
    }
}

static unsigned print_ranges(const char *what, const struct range *ranges)
{
    unsigned n;
    for (n = 0; n < REGION / 2 / sizeof *ranges && ranges[n].count; n++)
        printf("%s %llu %u\n", what, (unsigned long long)ranges[n].sector, ranges[n].count);
    printf("%s end %u\n", what, n);
    return n;
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    char reply[SHMP_REPLY];
    uint32_t size, cookie;

    if (argc != 2 || strlen(argv[1]) >= sizeof address.sun_path)
        return 1;
    strcpy(address.sun_path, argv[1]);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        die("connect");

    send_all(fd, "shmp");
    receive_all(fd, reply, sizeof reply);
    memcpy(&size, reply, sizeof size);
    int shm = shm_open(reply + 4, O_RDWR, 0);
    if (shm < 0)
        die("shm_open");
    char *region = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, shm, 0);
    if (region == MAP_FAILED)
        die("mmap");
    memcpy(&cookie, region, sizeof cookie);
    printf("cookie %x size %u\n", cookie, size);

    struct range *ranges = (struct range *)region;
    struct shared_ring *ring = (struct shared_ring *)(region + REGION / 2);
    char *data = region + REGION / 2 + PAGE;
    uint32_t slots = ring_size();
    printf("slots %u\n", slots);

    ask(fd, "peek");
    print_ranges("peek", ranges);
    ask(fd, "getw");
    unsigned count = print_ranges("getw", ranges);

    /* All requests at once, each range at its own place in the data area. */
    uint32_t req_prod_pvt = ring->req_prod, rsp_cons = ring->rsp_prod, offset = 0;
    if (count > slots)
        return 1;
    for (unsigned n = 0; n < count; n++) {
        struct extent *request = &ring->slot[req_prod_pvt++ & (slots - 1)];
        request->sector = ranges[n].sector;
        request->count = ranges[n].count;
        request->offset = offset;
        offset += ranges[n].count * SECTOR;
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint32_t old = ring->req_prod;
    ring->req_prod = req_prod_pvt;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if ((uint32_t)(req_prod_pvt - ring->req_event) < (uint32_t)(req_prod_pvt - old))
        send_all(fd, "kick");

    while (rsp_cons != req_prod_pvt) {
        struct control_message kick;
        receive_all(fd, &kick, sizeof kick);
        if (memcmp(kick.command, "kick", 4))
            return 1;
        uint32_t rsp_prod = __atomic_load_n(&ring->rsp_prod, __ATOMIC_ACQUIRE);
        for (; rsp_cons != rsp_prod; rsp_cons++) {
            struct extent response = ring->slot[rsp_cons & (slots - 1)];
            unsigned sum = 0;
            for (uint32_t at = 0; at < response.count * SECTOR; at++)
                sum = sum * 31 + (unsigned char)data[response.offset + at];
            printf("data %llu %u %u\n", (unsigned long long)response.sector, response.count, sum);
        }
        ring->rsp_event = rsp_cons + 1;
    }

    ask(fd, "clrw");
    ask(fd, "peek");
    print_ranges("left", ranges);
    return 0;
}
