// FP16 numbers in the place of an FP8 group's scale, which give every product with an E4M3 code the same
// E2M1 code.
//
// To the nearest, an E2M1 code depends on which half-way points the product is above or at: a half-way point
// has the mantissa 4, 5, 6 or 7 over 4, an E4M3 code 8 to 15 over 8. So of the scale's mantissa only its
// place among their 26 quotients matters, and any number between the same two neighbours will do; they are
// 2/195 apart or more. A quotient that a float can be (1, 1.25, 1.5, 1.75) is its own stand-in.
#pragma once

constexpr int kStandInCells = 128;  // by the upper bits of the mantissa; no cell has two quotients
constexpr int kMantissaBits = 23;

// Low half: FP16 for the scale's mantissa; high half: for a tenth of it, which needs to know the place among
// the quotients of 5 only.
struct alignas(16) StandIn {
    uint32_t bound;  // `below` for mantissas of the cell that are less, `above` for the others
    uint32_t below;
    uint32_t above;
    uint32_t padding;
};

struct StandIns {
    StandIn cells[kStandInCells];
};

__device__ constexpr double quotient(int half_way, int code) {
    return (2 * half_way < code ? 4.0 : 2.0) * half_way / code;
}

// The quotient next to x, not below it, or below it and not x.
__device__ constexpr double next_quotient(double x, bool tenth, bool upwards) {
    double best = upwards ? 2.0 : 1.0;
    for (int half_way = tenth ? 5 : 4; half_way <= (tenth ? 5 : 7); ++half_way) {
        for (int code = 8; code < 16; ++code) {
            const double q = quotient(half_way, code);
            if (upwards ? q > x && q < best : q <= x && q > best) best = q;
        }
    }
    return best;
}

// FP16 bits of x, rounded down; 2^-4 <= x < 2.
__device__ constexpr uint32_t half_bits(double x) {
    uint32_t exponent = 15;
    for (; x < 1; x *= 2)
        --exponent;
    return exponent << 10 | static_cast<uint32_t>((x - 1) * 1024);
}

// For the mantissa x, or, if it is a quotient and not `exact`, for those that follow.
__device__ constexpr uint32_t stand_in(double x, bool exact) {
    const double low = next_quotient(x, false, false), low5 = next_quotient(x, true, false);
    const double middle = (low + next_quotient(x, false, true)) / 2;
    const double middle5 = (low5 + next_quotient(x, true, true)) / 2;
    return half_bits(exact && low == x ? x : middle) | half_bits((exact && low5 == x ? x : middle5) / 10)
                                                           << 16;
}

__device__ constexpr StandIns make_stand_ins() {
    StandIns out = {};
    for (int i = 0; i < kStandInCells; ++i) {
        const double start = 1 + static_cast<double>(i) / kStandInCells, end = start + 1.0 / kStandInCells;
        const bool starts = next_quotient(start, false, false) == start;
        const double q = starts ? start : next_quotient(start, false, true);
        StandIn& cell = out.cells[i];
        cell.below = stand_in(start, true);
        cell.above = cell.below;
        if (q >= end) continue;
        cell.bound = static_cast<uint32_t>((q - 1) * (1 << kMantissaBits)) + 1;
        cell.above = stand_in(q, false);
    }
    return out;
}

__device__ constexpr StandIns kStandIns = make_stand_ins();
