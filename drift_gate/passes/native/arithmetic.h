/* float32 arithmetic without branches, for loops that become vectors. */

INLINE float NAME(from_bits)(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

INLINE uint32_t NAME(to_bits)(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

INLINE float NAME(from_half)(uint16_t h)
{
    uint32_t exponent = h & 0x7c00u, u = (uint32_t)(h & 0x7fffu) << 13;
    float subnormal = NAME(from_bits)(u + (113u << 23)) - NAME(from_bits)(113u << 23);
    uint32_t normal = u + (112u << 23), special = u + (224u << 23);
    uint32_t found = exponent == 0x7c00u ? special : normal;
    found = exponent == 0 ? NAME(to_bits)(subnormal) : found;
    return NAME(from_bits)(found | (uint32_t)(h & 0x8000u) << 16);
}

/* Rounded to nearest, ties to even, as below. */
INLINE uint16_t NAME(to_half)(float f)
{
    uint32_t u = NAME(to_bits)(f), sign = u & 0x80000000u, size = u ^ sign;
    uint32_t special = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    uint32_t subnormal = NAME(to_bits)(NAME(from_bits)(size) + 0.5f) - 0x3f000000u;
    uint32_t normal = (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13;
    uint32_t found = size >= 143u << 23 ? special : normal;
    found = size < 113u << 23 ? subnormal : found;
    return (uint16_t)(found | sign >> 16);
}

INLINE uint16_t NAME(to_brain)(float f)
{
    uint32_t u = NAME(to_bits)(f), rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* exp(r) - 1 of |r| <= log(2) / 2: the polynomial of the Cephes library (S. L. Moshier). */
INLINE float NAME(growth)(float r)
{
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + r;
}

/* x = k log(2) + r; the last bits of `shifted` are k. */
struct NAME(parts) {
    float shifted, r;
};

INLINE struct NAME(parts) NAME(parts_of)(float x)
{
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23 */
    float k = shifted - 12582912.0f;
    return (struct NAME(parts)){shifted, x - k * 0.693359375f - k * -2.12194440e-4f};
}

/* 2^k of -126 <= k <= 127 */
INLINE float NAME(power)(uint32_t k)
{
    return NAME(from_bits)((k << 23) + 0x3f800000u);
}

/* exp(x) of x <= 0 within a unit in the last place; below float32's normal numbers it is 0. */
INLINE float NAME(exp)(float x)
{
    struct NAME(parts) of = NAME(parts_of)(x);
    float p = (NAME(growth)(of.r) + 1.0f) * NAME(power)(NAME(to_bits)(of.shifted));
    return x < -87.33654f ? 0.0f : p;
}

/* The same of any x. */
INLINE float NAME(exp_any)(float x)
{
    struct NAME(parts) of = NAME(parts_of)(x);
    int32_t k = (int32_t)(NAME(to_bits)(of.shifted) - 0x4b400000u), half = k / 2; /* k may be 128 */
    float p = (NAME(growth)(of.r) + 1.0f) * NAME(power)((uint32_t)half);
    p *= NAME(power)((uint32_t)(k - half));
    p = x < -87.33654f ? 0.0f : p;
    return x > 88.72284f ? INFINITY : p;
}

/* exp(x) - 1 of x <= 0 */
INLINE float NAME(expm1)(float x)
{
    struct NAME(parts) of = NAME(parts_of)(x);
    float power = NAME(power)(NAME(to_bits)(of.shifted));
    float p = power * NAME(growth)(of.r) + (power - 1.0f);
    return x < -87.33654f ? -1.0f : p;
}

/* exp(x) of any x within some units in the last place of a double; 0 below 1e-307. */
INLINE double NAME(exp_double)(double x)
{
    double shifted = x * 1.4426950408889634 + 6755399441055744.0; /* 1.5 * 2^52 */
    double k = shifted - 6755399441055744.0;
    double r = x - k * 0.6931471803691238 - k * 1.9082149292705877e-10, p = 1 / 479001600.0;
    p = p * r + 1 / 39916800.0;
    p = p * r + 1 / 3628800.0;
    p = p * r + 1 / 362880.0;
    p = p * r + 1 / 40320.0;
    p = p * r + 1 / 5040.0;
    p = p * r + 1 / 720.0;
    p = p * r + 1 / 120.0;
    p = p * r + 1 / 24.0;
    p = p * r + 1 / 6.0;
    p = p * r + 0.5;
    p = p * (r * r) + r + 1.0;
    uint64_t bits;
    double power;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 52) + 0x3ff0000000000000u;
    memcpy(&power, &bits, sizeof power);
    p = x < -707.0 ? 0.0 : p * power;
    return x > 709.0 ? INFINITY : p;
}

/* log(x) within two units in the last place, of normal numbers; NaN and inf stay. Cephes, too. */
INLINE float NAME(log)(float x)
{
    uint32_t u = NAME(to_bits)(x);
    int32_t exponent = (int32_t)(u - 0x3f3504f3u) >> 23; /* of x / sqrt(1/2) */
    float k = (float)exponent, f = NAME(from_bits)(u - ((uint32_t)exponent << 23)) - 1.0f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    p = p * f * (f * f) + k * -2.12194440e-4f - 0.5f * (f * f);
    return x < INFINITY ? f + p + k * 0.693359375f : x;
}

/* log(1 + x) of -1 < x <= 0 */
INLINE float NAME(log1p)(float x)
{
    float y = 1.0f + x;
    y = y < FLT_MIN ? FLT_MIN : y;
    return NAME(log)(y) + (x - (y - 1.0f)) / y;
}
