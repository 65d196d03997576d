// Decode attention over the paged KV pool: one new token per sequence reads its keys and values once, where they lie.
//
// Compiled by the machine that runs it (core/compiled.py). Plain C with the vector types that GCC and Clang share: no
// intrinsics, no Python, no torch, no libm. Everything is summed in float32, in an order that depends on a sequence's
// own length and nothing else, so a result is bitwise the same in any batch, on any blocks and with any thread count.

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define LANES 8       // float32 in a vector: a register of AVX2, two of NEON
#define COLUMN 8      // vectors that are summed at a time: half of AVX2's registers
#define TILE 16       // tokens whose scores are computed before their values are read; a block holds whole tiles
#define MAX_GROUP 128 // query heads of one KV head
#define MAX_DIM 512   // of keys and of values
#define MAX_VECTORS (MAX_DIM / LANES)
#define SMALL (1 << 17) // elements of KV under which a second thread costs more than it takes over

// The limits, for the caller to keep.
const int64_t splitserve_tile = TILE, splitserve_max_group = MAX_GROUP, splitserve_max_dim = MAX_DIM;

#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

// cpu_attention.py declares the same fields in the same order.
typedef struct {
    const float *query;          // [num_sequences, num_kv_heads * group, key_dim]
    float *output;               // [num_sequences, num_kv_heads * group, value_dim]
    const void *pool;            // KV dtype: [block][...], one row per block
    const int64_t *block_tables; // [num_sequences, table_stride]
    const int64_t *positions;    // [num_sequences], of the new token: the last that is visible
    const float *sinks;          // [num_kv_heads * group] or null: a logit that attends to nothing
    int64_t table_stride;
    int64_t num_sequences;
    int64_t num_kv_heads;
    int64_t group;               // query heads per KV head
    int64_t key_dim;
    int64_t value_dim;
    int64_t block_size;          // tokens, a multiple of TILE
    int64_t num_blocks;          // of the pool
    int64_t row_elements;        // per block
    int64_t key_offset;          // elements from a row's start to this layer's keys [num_kv_heads][block_size][key_dim]
    int64_t value_offset;        // to its values [num_kv_heads][block_size][value_dim]
    int64_t window;              // tokens that a query sees, itself included; 0: all
    int64_t is_bfloat16;         // else float32
    float scaling;
    float softcap;               // 0: none
} DecodeArguments;

typedef struct {
    const DecodeArguments *arguments;
    atomic_llong next;           // of the pairs (sequence, KV head) nobody has taken yet
} Work;

ALWAYS_INLINE float lanes_sum(vec v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

ALWAYS_INLINE vec splat(float x) { return x - (vec){0}; }

// e^x to 2 units in the last place; 0 under -87, where float32 leaves its normal range.
ALWAYS_INLINE vec exponential(vec x) {
    const vec shift = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    const ivec tiny = x < splat(-87.0f);
    vec n = x * 1.44269504088896341f + shift;
    // The integer sits in the low bits: moved into the exponent, what is above it falls off.
    const vec power = (vec)(((ivec)n << 23) + (127 << 23));
    n -= shift;
    vec r = x - n * 0.693145751953125f - n * 1.42860682030941723e-6f; // ln 2 in two parts
    vec p = splat(1.0f / 5040.0f);
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (vec)((ivec)(p * power) & ~tiny);
}

ALWAYS_INLINE vec capped(vec score, float softcap) {
    vec x = score * (2.0f / softcap);
    const ivec large = x > splat(40.0f);
    x = (vec)(((ivec)x & ~large) | ((ivec)splat(40.0f) & large)); // e^x stays finite
    return softcap - 2.0f * softcap / (exponential(x) + 1.0f); // tanh(x / 2) = 1 - 2 / (e^x + 1)
}

// Elements from the pool's start to the tile that begins with `token`.
ALWAYS_INLINE ptrdiff_t tile_at(const DecodeArguments *a, const int64_t *table, int64_t token, int64_t head,
                                int64_t offset, int64_t dim) {
    const int64_t row = table[token / a->block_size] * a->row_elements;
    return row + offset + (head * a->block_size + token % a->block_size) * dim;
}

// Tokens [begin, end) of a tile as float32 rows of whole vectors: in the pool itself if they lie there like that, else
// in `buffer`, where the lanes past `dim` are 0.
ALWAYS_INLINE const float *tile_rows(const DecodeArguments *a, ptrdiff_t tile, int64_t begin, int64_t end, int64_t dim,
                                     float *buffer) {
    if (!a->is_bfloat16 && dim % LANES == 0) return (const float *)a->pool + tile;
    const int64_t vectors = (dim + LANES - 1) / LANES, whole = dim / LANES;
    for (int64_t t = begin; t < end; t++) {
        vec *row = (vec *)buffer + t * vectors;
        const ptrdiff_t at = tile + t * dim;
        if (whole < vectors) row[whole] = splat(0.0f);
        if (a->is_bfloat16) {
            const uint16_t *from = (const uint16_t *)a->pool + at;
            for (int64_t i = 0; i < whole; i++)
                row[i] = (vec)(__builtin_convertvector(*(const hvec *)(from + i * LANES), uvec) << 16);
            for (int64_t i = whole * LANES; i < dim; i++) ((uint32_t *)row)[i] = (uint32_t)from[i] << 16;
        } else {
            const float *from = (const float *)a->pool + at;
            for (int64_t i = 0; i < dim; i++) ((float *)row)[i] = from[i];
        }
    }
    return buffer;
}

// Memory that will be read next. It is asked for a few lines at a time between the arithmetic, into the second-level
// cache: all at once, or into the first level, the requests fill the core's few slots and stop the arithmetic. With two
// threads, 32 sequences of 512 tokens and 30 layers that took 54 ms and 44 ms, instead of 32.
typedef struct {
    const char *at, *end;
    int64_t lines; // of 64 bytes, each time
} Ahead;

ALWAYS_INLINE void fetch(Ahead *ahead) {
    for (int64_t i = 0; i < ahead->lines && ahead->at < ahead->end; i++, ahead->at += 64)
        __builtin_prefetch(ahead->at, 0, 2);
}

// The tile that begins with `token`, in `times` parts.
ALWAYS_INLINE Ahead fetch_ahead(const DecodeArguments *a, ptrdiff_t tile, int64_t dim, int64_t times) {
    const int64_t element = a->is_bfloat16 ? 2 : 4, bytes = TILE * dim * element;
    const char *at = (const char *)a->pool + tile * element;
    return (Ahead){at, at + bytes, (bytes + 64 * times - 1) / (64 * times)};
}

// scores[begin..end) = query . keys; four tokens at a time share the reads of the query and hide each other's latency.
ALWAYS_INLINE void dot_products(const vec *query, const float *keys, int64_t begin, int64_t end, int64_t vectors,
                                float *scores, Ahead *ahead) {
    int64_t t = begin;
    for (; t + 4 <= end; t += 4) {
        fetch(ahead);
        const vec *k0 = (const vec *)keys + t * vectors, *k1 = k0 + vectors, *k2 = k1 + vectors, *k3 = k2 + vectors;
        vec s0 = splat(0.0f), s1 = s0, s2 = s0, s3 = s0;
        for (int64_t i = 0; i < vectors; i++) {
            s0 += query[i] * k0[i];
            s1 += query[i] * k1[i];
            s2 += query[i] * k2[i];
            s3 += query[i] * k3[i];
        }
        scores[t] = lanes_sum(s0);
        scores[t + 1] = lanes_sum(s1);
        scores[t + 2] = lanes_sum(s2);
        scores[t + 3] = lanes_sum(s3);
    }
    for (; t < end; t++) {
        vec s = splat(0.0f);
        for (int64_t i = 0; i < vectors; i++) s += query[i] * ((const vec *)keys)[t * vectors + i];
        scores[t] = lanes_sum(s);
    }
}

// output += weights . values, in columns of as many vectors as the registers of any CPU hold.
ALWAYS_INLINE void add_weighted(const float *weights, const float *values, int64_t begin, int64_t end, int64_t vectors,
                                vec *output, Ahead *ahead) {
    int64_t i = 0;
    for (; i + COLUMN <= vectors; i += COLUMN) {
        vec sums[COLUMN];
        for (int j = 0; j < COLUMN; j++) sums[j] = output[i + j];
        for (int64_t t = begin; t < end; t++) {
            fetch(ahead);
            for (int j = 0; j < COLUMN; j++) sums[j] += weights[t] * ((const vec *)values)[t * vectors + i + j];
        }
        for (int j = 0; j < COLUMN; j++) output[i + j] = sums[j];
    }
    for (; i < vectors; i++) {
        vec sum = output[i];
        for (int64_t t = begin; t < end; t++) sum += weights[t] * ((const vec *)values)[t * vectors + i];
        output[i] = sum;
    }
}

// One sequence, one KV head, all its query heads: online softmax over tiles of tokens.
static void attend(const DecodeArguments *a, int64_t sequence, int64_t head) {
    const int64_t key_vectors = (a->key_dim + LANES - 1) / LANES, value_vectors = (a->value_dim + LANES - 1) / LANES;
    vec query[MAX_GROUP * MAX_VECTORS], output[MAX_GROUP * MAX_VECTORS];
    vec key_buffer[TILE * MAX_VECTORS], value_buffer[TILE * MAX_VECTORS];
    float largest[MAX_GROUP], sum[MAX_GROUP];
    const int64_t first_query = (sequence * a->num_kv_heads + head) * a->group;
    for (int64_t g = 0; g < a->group; g++) {
        const float *given = a->query + (first_query + g) * a->key_dim;
        for (int64_t i = 0; i < key_vectors * LANES; i++)
            ((float *)(query + g * key_vectors))[i] = i < a->key_dim ? given[i] * a->scaling : 0.0f;
        for (int64_t i = 0; i < value_vectors; i++) output[g * value_vectors + i] = splat(0.0f);
        largest[g] = a->sinks ? a->sinks[head * a->group + g] : -__builtin_inff();
        sum[g] = a->sinks ? 1.0f : 0.0f;
    }

    const int64_t last = a->positions[sequence];
    const int64_t first = a->window && last >= a->window ? last - a->window + 1 : 0;
    const int64_t *table = a->block_tables + sequence * a->table_stride;
    for (int64_t token = first / TILE * TILE; token <= last; token += TILE) {
        const ptrdiff_t keys_at = tile_at(a, table, token, head, a->key_offset, a->key_dim);
        const ptrdiff_t values_at = tile_at(a, table, token, head, a->value_offset, a->value_dim);
        // Tokens of the tile outside of [begin, end) may hold anything: they are not read.
        const int64_t begin = first > token ? first - token : 0, end = last - token < TILE ? last - token + 1 : TILE;
        const float *keys = tile_rows(a, keys_at, begin, end, a->key_dim, (float *)key_buffer);
        const float *values = tile_rows(a, values_at, begin, end, a->value_dim, (float *)value_buffer);
        Ahead next_keys = {0}, next_values = {0};
        if (token + TILE <= last) {
            const ptrdiff_t keys_next = tile_at(a, table, token + TILE, head, a->key_offset, a->key_dim);
            const ptrdiff_t values_next = tile_at(a, table, token + TILE, head, a->value_offset, a->value_dim);
            next_keys = fetch_ahead(a, keys_next, a->key_dim, a->group * TILE / 4);
            next_values = fetch_ahead(a, values_next, a->value_dim, a->group * TILE);
        }
        for (int64_t g = 0; g < a->group; g++) {
            vec scores[TILE / LANES];
            float *score = (float *)scores, peak = largest[g];
            for (int64_t i = 0; i < TILE / LANES; i++) scores[i] = splat(-__builtin_inff());
            dot_products(query + g * key_vectors, keys, begin, end, key_vectors, score, &next_keys);
            if (a->softcap)
                for (int64_t t = begin; t < end; t++) score[t] = capped(splat(score[t]), a->softcap)[0];
            for (int64_t t = begin; t < end; t++) peak = score[t] > peak ? score[t] : peak;
            vec *out = output + g * value_vectors;
            if (peak > largest[g]) {
                const float shrink = exponential(splat(largest[g] - peak))[0];
                sum[g] *= shrink;
                for (int64_t i = 0; i < value_vectors; i++) out[i] *= shrink;
                largest[g] = peak;
            }
            vec total = splat(0.0f);
            for (int64_t i = 0; i < TILE / LANES; i++) total += scores[i] = exponential(scores[i] - peak);
            sum[g] += lanes_sum(total);
            add_weighted(score, values, begin, end, value_vectors, out, &next_values);
        }
    }

    for (int64_t g = 0; g < a->group; g++)
        for (int64_t i = 0; i < a->value_dim; i++)
            a->output[(first_query + g) * a->value_dim + i] = ((const float *)(output + g * value_vectors))[i] / sum[g];
}

static void take_pairs(void *shared) {
    Work *work = shared;
    const DecodeArguments *a = work->arguments;
    const long long num_pairs = a->num_sequences * a->num_kv_heads;
    for (long long pair; (pair = atomic_fetch_add(&work->next, 1)) < num_pairs;)
        attend(a, pair / a->num_kv_heads, pair % a->num_kv_heads);
}

// Whether every position has its block, and every block is one of the pool's.
static int in_range(const DecodeArguments *a) {
    if (a->group > MAX_GROUP || a->key_dim > MAX_DIM || a->value_dim > MAX_DIM || a->block_size % TILE) return 0;
    for (int64_t sequence = 0; sequence < a->num_sequences; sequence++) {
        const int64_t last = a->positions[sequence];
        if (last < 0 || last / a->block_size >= a->table_stride) return 0;
        for (int64_t i = 0; i <= last / a->block_size; i++) {
            const int64_t block = a->block_tables[sequence * a->table_stride + i];
            if (block < 0 || block >= a->num_blocks) return 0;
        }
    }
    return 1;
}

// Returns 0 if it did nothing, because an argument is out of its range.
//
// `parallel` is GOMP_parallel of the OpenMP runtime that torch runs its threads with: a second pool of threads would
// fight with the first one, whose threads spin while they wait.
int splitserve_decode_attention(const DecodeArguments *arguments,
                                void (*parallel)(void (*)(void *), void *, unsigned, unsigned), unsigned num_threads) {
    const DecodeArguments *a = arguments;
    if (!in_range(a)) return 0;
    int64_t num_tokens = 0;
    for (int64_t sequence = 0; sequence < a->num_sequences; sequence++) num_tokens += a->positions[sequence] + 1;
    Work work = {.arguments = a, .next = 0};
    if (num_threads > 1 && num_tokens * a->num_kv_heads * (a->key_dim + a->value_dim) > SMALL)
        parallel(take_pairs, &work, num_threads, 0);
    else
        take_pairs(&work);
    return 1;
}
