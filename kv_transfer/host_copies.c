// KV in memory of hosts: blocks are copied, gathered and scattered in one pass that also sums up what it stores.
//
// Compiled by the machine that runs it (core/compiled.py). A sum is xxh3_64 of the bytes in their order, which the
// specification of xxHash defines for more than 240 of them, so the other side may compute it by that library. Every 64
// bytes are loaded once: what is summed up is what is written, whatever others do to the source meanwhile.

#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "XXH3 reads numbers in little-endian order"
#endif

#define STRIPE 64  // bytes that are summed up at a time
#define STRIPES 16 // of them in a block, after which the sums are scrambled

#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u

#define ALWAYS_INLINE static inline __attribute__((always_inline))

// What XXH3 takes where no other is given.
static const uint8_t secret[192] __attribute__((aligned(STRIPE))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

ALWAYS_INLINE uint64_t read64(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

// -- a stripe, and eight sums of 64 bits --

#ifdef __AVX2__

typedef struct {
    __m256i low, high;
} Stripe;

ALWAYS_INLINE __m256i load32(const uint8_t *at) { return _mm256_loadu_si256((const __m256i *)at); }

ALWAYS_INLINE Stripe load(const uint8_t *at) { return (Stripe){load32(at), load32(at + 32)}; }

ALWAYS_INLINE void store(uint8_t *at, Stripe stripe) {
    _mm256_storeu_si256((__m256i *)at, stripe.low);
    _mm256_storeu_si256((__m256i *)(at + 32), stripe.high);
}

// Past the caches, which then need not read first what is overwritten.
ALWAYS_INLINE void store_past_caches(uint8_t *at, Stripe stripe) {
    _mm256_stream_si256((__m256i *)at, stripe.low);
    _mm256_stream_si256((__m256i *)(at + 32), stripe.high);
}

ALWAYS_INLINE void end_of_stores(void) { _mm_sfence(); }

ALWAYS_INLINE __m256i accumulate32(__m256i sums, __m256i data, __m256i key) {
    const __m256i mixed = data ^ key;
    const __m256i products = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
    const __m256i neighbours = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(_mm256_add_epi64(sums, neighbours), products);
}

ALWAYS_INLINE Stripe accumulate(Stripe sums, Stripe data, const uint8_t *key) {
    const __m256i low = accumulate32(sums.low, data.low, load32(key));
    return (Stripe){low, accumulate32(sums.high, data.high, load32(key + 32))};
}

ALWAYS_INLINE __m256i scramble32(__m256i sums, __m256i key) {
    const __m256i prime = _mm256_set1_epi32((int)PRIME32_1);
    const __m256i mixed = sums ^ _mm256_srli_epi64(sums, 47) ^ key;
    const __m256i upper = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(upper, 32));
}

ALWAYS_INLINE Stripe scramble(Stripe sums, const uint8_t *key) {
    return (Stripe){scramble32(sums.low, load32(key)), scramble32(sums.high, load32(key + 32))};
}

#else

typedef uint64_t Stripe __attribute__((vector_size(STRIPE)));

ALWAYS_INLINE Stripe load(const uint8_t *at) {
    Stripe stripe;
    memcpy(&stripe, at, STRIPE);
    return stripe;
}

ALWAYS_INLINE void store(uint8_t *at, Stripe stripe) { memcpy(at, &stripe, STRIPE); }

ALWAYS_INLINE void store_past_caches(uint8_t *at, Stripe stripe) { store(at, stripe); }

ALWAYS_INLINE void end_of_stores(void) {}

ALWAYS_INLINE Stripe accumulate(Stripe sums, Stripe data, const uint8_t *key) {
    const Stripe mixed = data ^ load(key);
    const Stripe neighbours = {data[1], data[0], data[3], data[2], data[5], data[4], data[7], data[6]};
    return sums + neighbours + (mixed & 0xFFFFFFFFu) * (mixed >> 32);
}

ALWAYS_INLINE Stripe scramble(Stripe sums, const uint8_t *key) {
    return (sums ^ (sums >> 47) ^ load(key)) * PRIME32_1;
}

#endif

// -- an input, run by run --

typedef enum { NOWHERE, INTO_CACHES, PAST_CACHES } Target;

typedef struct {
    Stripe sums, last; // the very last stripe counts differently
    int64_t in_block;  // stripes of the block that has begun
    int64_t done, total; // bytes
} Input;

static Input input_of(int64_t total) {
    const uint64_t first[] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    const Stripe sums = load((const uint8_t *)first);
    return (Input){.sums = sums, .last = sums, .total = total};
}

ALWAYS_INLINE Stripe put(Target target, uint8_t *to, const uint8_t *from) {
    const Stripe stripe = load(from);
    if (target == INTO_CACHES) store(to, stripe);
    if (target == PAST_CACHES) store_past_caches(to, stripe);
    return stripe;
}

// Whole stripes up to the next end of a block.
ALWAYS_INLINE int64_t put_single(Target target, Input *input, uint8_t *to, const uint8_t *from, int64_t at,
                                 int64_t size) {
    for (; at < size; at += STRIPE) {
        const Stripe stripe = put(target, to + at, from + at);
        input->sums = accumulate(input->sums, stripe, secret + 8 * input->in_block);
        if (++input->in_block == STRIPES) {
            input->sums = scramble(input->sums, secret + 128);
            input->in_block = 0;
            return at + STRIPE;
        }
    }
    return at;
}

// The next `size` bytes of an input, whole stripes, are copied and counted.
ALWAYS_INLINE void put_run(Target target, Input *input, uint8_t *to, const uint8_t *from, int64_t size) {
    input->done += size;
    const int64_t most = input->done < input->total ? size : size - STRIPE;
    int64_t at = input->in_block ? put_single(target, input, to, from, 0, most) : 0;
    Stripe sums = input->sums;
    for (; at + STRIPES * STRIPE <= most; at += STRIPES * STRIPE) {
        for (int64_t i = 0; i < STRIPES; i++)
            sums = accumulate(sums, put(target, to + at + STRIPE * i, from + at + STRIPE * i), secret + 8 * i);
        sums = scramble(sums, secret + 128);
    }
    input->sums = sums;
    put_single(target, input, to, from, at, most);
    if (most < size) input->last = put(target, to + most, from + most);
}

static uint64_t fold(uint64_t a, uint64_t b) {
    const unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

// All of an input was put: its xxh3_64.
static uint64_t sum_of(const Input *input) {
    uint64_t sums[8], sum = (uint64_t)input->total * PRIME64_1;
    end_of_stores();
    store((uint8_t *)sums, accumulate(input->sums, input->last, secret + 121));
    for (int i = 0; i < 8; i += 2)
        sum += fold(sums[i] ^ read64(secret + 11 + 8 * i), sums[i + 1] ^ read64(secret + 19 + 8 * i));
    sum = (sum ^ (sum >> 37)) * 0x165667919E3779F9u;
    return sum ^ (sum >> 32);
}

// -- what host_copies.py calls --

// The same `width` bytes of `count` rows each, which begin `offset` bytes inside them. Without a target they are only
// summed up.
uint64_t splitserve_copy_rows(uint8_t *target, const uint8_t *source, const int64_t *target_rows,
                              const int64_t *source_rows, int64_t count, int64_t row_bytes, int64_t offset,
                              int64_t width) {
    Input input = input_of(count * width);
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *from = source + source_rows[i] * row_bytes + offset;
        if (target)
            put_run(PAST_CACHES, &input, target + target_rows[i] * row_bytes + offset, from, width);
        else
            put_run(NOWHERE, &input, 0, from, width);
    }
    return sum_of(&input);
}

// host_copies.py declares the same fields in the same order.
typedef struct {
    uint8_t *rows;         // of a pool
    uint8_t *flat;         // the part in canonical order: [plane][head][token][bytes of it]
    const int64_t *blocks; // that hold the part's tokens
    const int64_t *planes; // [num_planes][2]: bytes from a row's start to the part's first head, bytes of a token there
    int64_t row_bytes;
    int64_t num_planes;
    int64_t num_heads;
    int64_t block_size;  // tokens
    int64_t first_token; // inside the first block
    int64_t num_tokens;
    int64_t num_bytes; // of `flat`
} Part;

ALWAYS_INLINE uint64_t move_part(const Part *part, int gather) {
    Input input = input_of(part->num_bytes);
    uint8_t *flat = part->flat;
    for (int64_t plane = 0; plane < part->num_planes; plane++) {
        const int64_t offset = part->planes[2 * plane], token_bytes = part->planes[2 * plane + 1];
        for (int64_t head = 0; head < part->num_heads; head++) {
            const int64_t *block = part->blocks;
            int64_t inside = part->first_token, left = part->num_tokens;
            while (left > 0) {
                const int64_t room = part->block_size - inside, tokens = room < left ? room : left;
                const int64_t size = tokens * token_bytes, token = head * part->block_size + inside;
                uint8_t *paged = part->rows + *block++ * part->row_bytes + offset + token * token_bytes;
                if (gather)
                    put_run(INTO_CACHES, &input, flat, paged, size); // who sends it reads it next
                else
                    put_run(PAST_CACHES, &input, paged, flat, size);
                flat += size;
                left -= tokens;
                inside = 0;
            }
        }
    }
    return sum_of(&input);
}

uint64_t splitserve_gather(const Part *part) { return move_part(part, 1); }

uint64_t splitserve_scatter(const Part *part) { return move_part(part, 0); }
