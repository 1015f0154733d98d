// The memory's activation, and the inner loss with its gradient G_L; both with backward passes. `mlp.py` is the same in
// PyTorch.

#pragma once
#include <algorithm>
#include <limits>

#include "matmul.h"

template <class T>
inline V<T> exponential(V<T> x) {  // one by one: double is for tests
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
    V<int> normed = __builtin_convertvector(number * 1.44269504f + half, V<int>);
    V<float> whole = __builtin_convertvector(normed, V<float>);
    V<float> r = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts, the first exact in 10 bits
    V<float> e = r * (1 / 5040.0f) + 1 / 720.0f;
    e = e * r + 1 / 120.0f;
    e = e * r + 1 / 24.0f;
    e = e * r + 1 / 6.0f;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    V<int> power = (normed + 127) << 23;
    V<float> two_to_n;
    std::memcpy(&two_to_n, &power, sizeof power);
    return e * two_to_n;
}

enum class Activation : long { silu, gelu };

// act(z) = z * sigmoid(c(z)): c(z) = z is silu, c(z) = 2 sqrt(2 / pi) (z + 0.044715 z^3) is gelu in its tanh form.
// Computes act, act' and act'' of `rows` rows, each unless its pointer is null.
template <class T>
void activate(Activation activation, long rows, long columns, const T* z, long ld, T* value, T* act_derivative,
              T* act_second_derivative) {
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
            if (act_derivative) store(act_derivative + at, s + x * ds * first);
            if (act_second_derivative) {
                V<T> dds = ds * (one - s - s);
                store(act_second_derivative + at, 2 * ds * first + x * (dds * first * first + ds * second));
            }
        }
}

// --------------------------------------------------------------------------------------------- the inner loss

template <class T>
struct Norm {  // of one row z: n(z) = (z - mean) * rstd
    std::vector<T> normed;
    T rstd = 0;

    explicit Norm(long width) : normed(width) {}

    void forward(const T* z) {
        long width = normed.size();
        T m = mean(z, width);
        for (long i = 0; i < width; ++i) normed[i] = z[i] - m;
        rstd = 1 / std::sqrt(dot(normed.data(), normed.data(), width) / width + T(1e-6));  // NORM_EPS
        for (long i = 0; i < width; ++i) normed[i] *= rstd;
    }

    // Compute the gradient by z, `out`, from that by n(z), `grad`.
    void backward(const T* by, T* out) const {
        long width = normed.size();
        T m = mean(by, width), along = dot(by, normed.data(), width) / width;
        for (long i = 0; i < width; ++i) out[i] = (by[i] - m - normed[i] * along) * rstd;
    }
};

// The inner loss of one token: M(k) - v, its square, and the gradient by Z_L. `weight` is the residual form's, or null;
// `clip` 0: no clip.
template <class T>
struct InnerLoss {
    long width;
    T clip;
    const T* weight = nullptr;
    Norm<T> norm;
    std::vector<T> error, gradient;
    T length = 0, loss = 0;

    InnerLoss(long width, T clip) : width(width), clip(clip), norm(width), error(width), gradient(width) {}

    T factor() const { return clip > 0 ? clip / (length + clip) : T(1); }

    // `shift`: M(k) - v less the MLP's part.
    void forward(const T* z, const T* shift) {
        if (weight) {
            norm.forward(z);
            std::vector<T>& u = gradient;
            for (long i = 0; i < width; ++i) error[i] = shift[i] + norm.normed[i] * weight[i];
            for (long i = 0; i < width; ++i) u[i] = 2 * error[i] * weight[i];
            norm.backward(u.data(), gradient.data());
        } else {
            for (long i = 0; i < width; ++i) error[i] = z[i] + shift[i];
            for (long i = 0; i < width; ++i) gradient[i] = 2 * error[i];
        }
        loss = dot(error.data(), error.data(), width);
        if (clip > 0) length = std::sqrt(dot(gradient.data(), gradient.data(), width));
    }

    // Compute the gradients by Z_L (`dz`) and by shift from those by G_L (`g`, overwritten) and by the loss. `dweight` is
    // added to.
    void backward(T* g, T grad_loss, T* dz, T* dshift, T* dweight) const {
        if (clip > 0) {  // G = gradient * s, s = clip / (length + clip); d length = gradient / length
            T s = factor(), least = std::max(length, std::numeric_limits<T>::min());
            T along = dot(g, gradient.data(), width) / least * (s * s / clip);  // 0 / tiny where the gradient is 0
            for (long i = 0; i < width; ++i) g[i] = g[i] * s - gradient[i] * along;
        }
        if (!weight) {
            for (long i = 0; i < width; ++i) dz[i] = dshift[i] = 2 * g[i] + 2 * grad_loss * error[i];
            return;
        }
        const T* normed = norm.normed.data();
        std::vector<T> u(width), du(width);
        norm.backward(g, du.data());
        for (long i = 0; i < width; ++i) {
            u[i] = 2 * weight[i] * error[i];
            dshift[i] = 2 * weight[i] * du[i] + 2 * grad_loss * error[i];
            dweight[i] += 2 * error[i] * du[i] + normed[i] * dshift[i];
        }
        T along_u = dot(u.data(), normed, width) / width, along_g = dot(g, normed, width) / width;
        T grad_inverse = dot(g, gradient.data(), width) * norm.rstd / width;
        for (long i = 0; i < width; ++i) u[i] = weight[i] * dshift[i] - norm.rstd * (along_u * g[i] + along_g * u[i]);
        norm.backward(u.data(), dz);
        for (long i = 0; i < width; ++i) dz[i] -= normed[i] * grad_inverse;
    }
};
