// The memory's activation, and the top of its key pass: from Z_L to G_L, and back. `mlp.py` says the same in PyTorch.

#pragma once
#include <algorithm>
#include <limits>

#include "products.h"

template <class T>
inline V<T> exponential(V<T> x) {  // a number at a time: double is for those who check
    for (int i = 0; i < WIDTH<T>; ++i) x[i] = std::exp(x[i]);
    return x;
}

// 2^n e^r, |r| <= ln(2) / 2, with Taylor's terms up to r^7 / 7!; the relative error is below 2e-7. NaN stays NaN.
template <>
inline V<float> exponential<float>(V<float> x) {
    V<float> low = V<float>{} - 87.0f, high = V<float>{} + 87.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    V<float> half = x < V<float>{} ? V<float>{} - 0.5f : V<float>{} + 0.5f;
    V<float> number = x == x ? x : V<float>{};  // what nan is as an integer is not defined
    V<int> n = __builtin_convertvector(number * 1.44269504f + half, V<int>);
    V<float> whole = __builtin_convertvector(n, V<float>);
    V<float> r = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts, the first exact in 10 bits
    V<float> e = r * (1 / 5040.0f) + 1 / 720.0f;
    e = e * r + 1 / 120.0f;
    e = e * r + 1 / 24.0f;
    e = e * r + 1 / 6.0f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    V<int> power = (n + 127) << 23;
    V<float> two_to_n;
    std::memcpy(&two_to_n, &power, sizeof power);
    return e * two_to_n;
}

enum class Activation : long { silu, gelu };

// act(z) = z * sigmoid(c(z)): c(z) = z is silu, c(z) = 2 sqrt(2 / pi) (z + 0.044715 z^3) is gelu in its tanh form.
// Value, slope and curvature, each where it is asked for, of `rows` rows.
template <class T>
void activate(Activation activation, long rows, long columns, const T* z, long ld, T* value, T* slope, T* curvature) {
    const T scale = 1.5957691216057308, cube = 0.044715;
    bool gelu = activation == Activation::gelu;
    for (long i = 0; i < rows; ++i)
        for (long j = 0; j < columns; j += WIDTH<T>) {
            long at = i * ld + j;
            V<T> x = load(z + at), one = V<T>{} + T(1), c = x, first = one, second = {};
            if (gelu) {
                V<T> square = x * x;
                c = scale * x * (one + cube * square);
                first = scale * (one + 3 * cube * square);
                second = 6 * scale * cube * x;
            }
            V<T> s = one / (one + exponential<T>(-c)), ds = s * (one - s);
            if (value) store(value + at, x * s);
            if (slope) store(slope + at, s + x * ds * first);
            if (curvature) {
                V<T> dds = ds * (one - s - s);
                store(curvature + at, 2 * ds * first + x * (dds * first * first + ds * second));
            }
        }
}

// --------------------------------------------------------------------------------------------- the output of the MLP

template <class T>
struct Norm {  // of one row z of width n: n(z) = (z - mean) * inverse
    std::vector<T> n;
    T inverse = 0;

    explicit Norm(long width) : n(width) {}

    void of(const T* z) {
        long width = n.size();
        T m = mean(z, width);
        for (long i = 0; i < width; ++i) n[i] = z[i] - m;
        inverse = 1 / std::sqrt(dot(n.data(), n.data(), width) / width + T(1e-6));  // NORM_EPS
        for (long i = 0; i < width; ++i) n[i] *= inverse;
    }

    // From the gradient by n(z) to that by z.
    void back(const T* by, T* out) const {
        long width = n.size();
        T m = mean(by, width), along = dot(by, n.data(), width) / width;
        for (long i = 0; i < width; ++i) out[i] = (by[i] - m - n[i] * along) * inverse;
    }
};

// One token: M(k) - v, the loss and its gradient by Z_L. `weight` w of the residual form, or null; `clip` 0: none.
template <class T>
struct Top {
    long width;
    T clip;
    const T* weight = nullptr;
    Norm<T> norm;
    std::vector<T> error, gradient;
    T size = 0, loss = 0;

    Top(long width, T clip) : width(width), clip(clip), norm(width), error(width), gradient(width) {}

    T factor() const { return clip > 0 ? clip / (size + clip) : T(1); }

    // `shift`: what M(k) adds to the MLP, or to w * n, less v.
    void of(const T* z, const T* shift) {
        if (weight) {
            norm.of(z);
            std::vector<T>& u = gradient;
            for (long i = 0; i < width; ++i) error[i] = shift[i] + norm.n[i] * weight[i];
            for (long i = 0; i < width; ++i) u[i] = 2 * error[i] * weight[i];
            norm.back(u.data(), gradient.data());
        } else {
            for (long i = 0; i < width; ++i) error[i] = z[i] + shift[i];
            for (long i = 0; i < width; ++i) gradient[i] = 2 * error[i];
        }
        loss = dot(error.data(), error.data(), width);
        if (clip > 0) size = std::sqrt(dot(gradient.data(), gradient.data(), width));
    }

    // From the gradients by G_L (`g`, spoilt) and by the loss to those by Z_L (`dz`) and by shift; dweight is added to.
    void back(T* g, T by_loss, T* dz, T* dshift, T* dweight) const {
        if (clip > 0) {  // G = gradient * s, s = clip / (size + clip); d size = gradient / size
            T s = factor(), least = std::max(size, std::numeric_limits<T>::min());
            T along = dot(g, gradient.data(), width) / least * (s * s / clip);  // 0 / tiny where the gradient is 0
            for (long i = 0; i < width; ++i) g[i] = g[i] * s - gradient[i] * along;
        }
        if (!weight) {
            for (long i = 0; i < width; ++i) dz[i] = dshift[i] = 2 * g[i] + 2 * by_loss * error[i];
            return;
        }
        const T* n = norm.n.data();
        std::vector<T> u(width), du(width);
        norm.back(g, du.data());
        for (long i = 0; i < width; ++i) {
            u[i] = 2 * weight[i] * error[i];
            dshift[i] = 2 * weight[i] * du[i] + 2 * by_loss * error[i];
            dweight[i] += 2 * error[i] * du[i] + n[i] * dshift[i];
        }
        T along_u = dot(u.data(), n, width) / width, along_g = dot(g, n, width) / width;
        T by_inverse = dot(g, gradient.data(), width) * norm.inverse / width;
        for (long i = 0; i < width; ++i)
            u[i] = weight[i] * dshift[i] - norm.inverse * (along_u * g[i] + along_g * u[i]);
        norm.back(u.data(), dz);
        for (long i = 0; i < width; ++i) dz[i] -= n[i] * by_inverse;
    }
};
