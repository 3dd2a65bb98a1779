/* A crop of an image, resized. native_crop.py builds it where it can; without it packages give the same bytes.
 *
 * Of a JPEG only the rows and columns of the crop are transformed and colored, by libjpeg-turbo's partial decoding. The
 * resize is Pillow's convolution in cykooz.resizer's fixed point: first down, rounded, then across.
 */

#include <immintrin.h>
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>

#if !defined(LIBJPEG_TURBO_VERSION_NUMBER) || LIBJPEG_TURBO_VERSION_NUMBER < 2000000
#error "libjpeg-turbo 2 or later is wanted"
#endif

enum { REFUSED = 1, NO_MEMORY = 2 };
enum { BILINEAR, BICUBIC, LANCZOS };

/* --- the resize --- */

/* Output i is the sum over taps k of weights[i * taps + k] * in[starts[i] + k], in units of 2 ** -precision. */
typedef struct {
  int taps, precision;
  int *starts;
  int16_t *weights;
} Axis;

static double sinc(double x) {
  return x == 0.0 ? 1.0 : sin(x * M_PI) / (x * M_PI);
}

static double filter_at(int filter, double x) {
  x = fabs(x);
  if (filter == BILINEAR) return x < 1.0 ? 1.0 - x : 0.0;
  if (filter == LANCZOS) return x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0;
  if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0; /* Catmull and Rom's cubic */
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

/* To the nearest whole number; a half away from zero. */
static double rounded(double x) {
  return trunc(x + copysign(0.49999999999999994, x));
}

/* The weights of `size` outputs that lie evenly over [begin, end) of `length` inputs; an even number of taps. */
static int axis_of(Axis *axis, int length, double begin, double end, int size, int filter) {
  double scale = (end - begin) / size, wide = scale > 1.0 ? scale : 1.0;
  double radius = (filter == BILINEAR ? 1.0 : filter == BICUBIC ? 2.0 : 3.0) * wide, narrow = 1.0 / wide;
  int most = (int)ceil(radius) * 2 + 1;
  double *exact = calloc((size_t)size * most, sizeof(double));
  axis->starts = malloc(size * sizeof(int));
  axis->weights = NULL;
  if (!exact || !axis->starts) return free(exact), NO_MEMORY;
  double largest = 0.0;
  axis->taps = 2;
  for (int i = 0; i < size; i++) {
    double center = begin + (i + 0.5) * scale, total = 0.0, *row = exact + (size_t)i * most;
    int first = (int)fmax(floor(center - radius), 0.0), last = (int)fmin(ceil(center + radius), length);
    for (int x = first; x < last; x++) total += row[x - first] = filter_at(filter, (x - (center - 0.5)) * narrow);
    if (total != 0.0)
      for (int x = first; x < last; x++) row[x - first] /= total;
    for (int x = first; x < last; x++) largest = fmax(largest, row[x - first]);
    axis->starts[i] = first;
    while (last - first > axis->taps && row[last - first - 1] == 0.0) last--;
    if (last - first > axis->taps) axis->taps = last - first;
  }
  axis->taps += axis->taps & 1;
  for (axis->precision = 0; axis->precision < 21; axis->precision++) /* weights are of 16 bits */
    if (rounded(largest * (1 << (axis->precision + 1))) >= 1 << 15) break;
  axis->weights = calloc((size_t)size * axis->taps, sizeof(int16_t));
  if (!axis->weights) return free(exact), NO_MEMORY;
  for (int i = 0; i < size; i++)
    for (int k = 0; k < axis->taps && k < most; k++)
      axis->weights[i * axis->taps + k] = (int16_t)rounded(exact[(size_t)i * most + k] * (1 << axis->precision));
  free(exact);
  return 0;
}

static uint8_t clipped(int32_t value) {
  return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

/* One row of `bytes` bytes out of `taps` rows, of which the weights lie in pairs. */
static void join_rows(const uint8_t *const *rows, uint8_t *out, int bytes, const int16_t *weights, int taps, int bits) {
  __m128i precision = _mm_cvtsi32_si128(bits);
  __m256i half = _mm256_set1_epi32(1 << (bits - 1)), zero = _mm256_setzero_si256();
  for (int x = 0; x + 32 <= bytes; x = x + 64 > bytes && x + 32 < bytes ? bytes - 32 : x + 32) {
    __m256i sums[4] = {half, half, half, half};
    for (int k = 0; k < taps; k += 2) {
      int32_t both;
      memcpy(&both, weights + k, sizeof(both));
      __m256i pair = _mm256_set1_epi32(both);
      __m256i first = _mm256_loadu_si256((const __m256i *)(rows[k] + x));
      __m256i second = _mm256_loadu_si256((const __m256i *)(rows[k + 1] + x));
      __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
      sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), pair));
      sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), pair));
      sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), pair));
      sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), pair));
    }
    for (int i = 0; i < 4; i++) sums[i] = _mm256_sra_epi32(sums[i], precision);
    __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
    _mm256_storeu_si256((__m256i *)(out + x), packed);
  }
  for (int x = 0; x < bytes && bytes < 32; x++) {
    int32_t sum = 1 << (bits - 1);
    for (int k = 0; k < taps; k++) sum += rows[k][x] * weights[k];
    out[x] = clipped(sum >> bits);
  }
}

/* Which bytes of a row make eight values of the resized one: a vector has two halves, each with a window of 16 bytes. */
typedef struct {
  int windows[2];
  __m256i bytes;
} Group;

/* The weights of two neighboring pixels for each of eight values: one multiplication takes a pair of taps. */
typedef union {
  __m256i vector;
  int16_t weights[16];
} Pairs;

/* How narrow_row gathers; 0 where neighbors lie too far apart for it. */
static int gather(const Axis *axis, int size, Group *groups, Pairs *pairs, int blocks) {
  int steps = axis->taps / 2;
  for (int g = 0; g < 4 * blocks; g++)
    for (int half = 0; half < 2; half++) {
      uint8_t *bytes = (uint8_t *)&groups[g].bytes + 16 * half;
      int first = 8 * g + 4 * half, window = first < 3 * size ? 3 * axis->starts[first / 3] : 0;
      groups[g].windows[half] = window;
      for (int i = 0; i < 4; i++) {
        int value = first + i, pixel = value / 3;
        int at = value < 3 * size ? 3 * axis->starts[pixel] + value % 3 - window : -1;
        if (at > 12) return 0;
        bytes[4 * i] = at < 0 ? 0x80 : at;
        bytes[4 * i + 2] = at < 0 ? 0x80 : at + 3;
        bytes[4 * i + 1] = bytes[4 * i + 3] = 0x80; /* a zero */
        for (int step = 0; step < steps; step++) {
          int16_t *pair = pairs[(size_t)g * steps + step].weights + 2 * (4 * half + i);
          pair[0] = at < 0 ? 0 : axis->weights[pixel * axis->taps + 2 * step];
          pair[1] = at < 0 ? 0 : axis->weights[pixel * axis->taps + 2 * step + 1];
        }
      }
    }
  return 1;
}

/* A row resized, to 32 * blocks bytes. */
static inline __attribute__((always_inline)) void narrow_row_by(int steps, const uint8_t *in, uint8_t *out, int bits,
                                                                const Group *groups, const Pairs *pairs, int blocks) {
  __m128i precision = _mm_cvtsi32_si128(bits);
  __m256i half = _mm256_set1_epi32(1 << (bits - 1)), in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int block = 0; block < blocks; block++) {
    __m256i sums[4];
    for (int quarter = 0; quarter < 4; quarter++, groups++) {
      const uint8_t *low = in + groups->windows[0], *high = in + groups->windows[1];
      __m256i sum = half;
      for (int step = 0; step < steps; step++, pairs++) {
        __m128i first = _mm_loadu_si128((const __m128i *)(low + 6 * step));
        __m128i second = _mm_loadu_si128((const __m128i *)(high + 6 * step));
        __m256i taken = _mm256_shuffle_epi8(_mm256_set_m128i(second, first), groups->bytes);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(taken, pairs->vector));
      }
      sums[quarter] = _mm256_sra_epi32(sum, precision);
    }
    __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(sums[0], sums[1]), _mm256_packs_epi32(sums[2], sums[3]));
    _mm256_storeu_si256((__m256i *)(out + 32 * block), _mm256_permutevar8x32_epi32(packed, in_order));
  }
}

static void narrow_row(int steps, const uint8_t *in, uint8_t *out, int bits, const Group *groups, const Pairs *pairs,
                       int blocks) {
  if (steps == 1) return narrow_row_by(1, in, out, bits, groups, pairs, blocks);
  if (steps == 2) return narrow_row_by(2, in, out, bits, groups, pairs, blocks);
  if (steps == 3) return narrow_row_by(3, in, out, bits, groups, pairs, blocks);
  narrow_row_by(steps, in, out, bits, groups, pairs, blocks);
}

static void narrow_row_plainly(const uint8_t *in, uint8_t *out, const Axis *axis, int size) {
  for (int value = 0; value < 3 * size; value++) {
    int pixel = value / 3;
    int32_t sum = 1 << (axis->precision - 1);
    for (int k = 0; k < axis->taps; k++)
      sum += in[3 * (axis->starts[pixel] + k) + value % 3] * axis->weights[pixel * axis->taps + k];
    out[value] = clipped(sum >> axis->precision);
  }
}

/* The box (left, top, right, bottom) of RGB pixels, `stride` bytes a row, to out [out_height, out_width, 3]. */
int fmcv_resize(const uint8_t *in, ptrdiff_t stride, int width, int height, const double *box, int filter,
                int out_height, int out_width, uint8_t *out) {
  Axis across = {0}, down = {0};
  int blocks = (3 * out_width + 31) / 32, status = NO_MEMORY;
  Group *groups = NULL;
  Pairs *pairs = NULL;
  uint8_t *joined = NULL, *narrowed = NULL;
  const uint8_t **rows = NULL;
  if (axis_of(&across, width, box[0], box[2], out_width, filter) ||
      axis_of(&down, height, box[1], box[3], out_height, filter))
    goto end;
  groups = aligned_alloc(32, 4 * blocks * sizeof(Group));
  pairs = aligned_alloc(32, (size_t)4 * blocks * across.taps / 2 * sizeof(Pairs));
  joined = calloc(3 * ((size_t)width + across.taps) + 32, 1); /* what is beyond the row has no weight */
  narrowed = malloc(32 * (size_t)blocks);
  rows = malloc(down.taps * sizeof(*rows));
  if (!groups || !pairs || !joined || !narrowed || !rows) goto end;
  int vectors = gather(&across, out_width, groups, pairs, blocks);
  for (int y = 0; y < out_height; y++) {
    int first = down.starts[y];
    for (int k = 0; k < down.taps; k++) /* rows that do not exist have no weight */
      rows[k] = in + (first + k < height ? first + k : first) * stride;
    join_rows(rows, joined, 3 * width, down.weights + y * down.taps, down.taps, down.precision);
    if (vectors)
      narrow_row(across.taps / 2, joined, narrowed, across.precision, groups, pairs, blocks);
    else
      narrow_row_plainly(joined, narrowed, &across, out_width);
    memcpy(out + (size_t)y * 3 * out_width, narrowed, 3 * (size_t)out_width);
  }
  status = 0;
end:
  free(across.starts), free(across.weights), free(down.starts), free(down.weights);
  free(groups), free(pairs), free(joined), free(narrowed), free(rows);
  return status;
}

/* --- JPEG --- */

typedef struct {
  struct jpeg_error_mgr base;
  jmp_buf refused;
} Errors;

static void refuse(j_common_ptr jpeg) {
  longjmp(((Errors *)jpeg->err)->refused, 1);
}

static void say_nothing(j_common_ptr jpeg, int level) {
  (void)jpeg, (void)level;
}

/* Gray, 4:4:4, 4:2:2 or 4:2:0: how others are interpolated differs between versions of the library. */
static int common_sampling(const struct jpeg_decompress_struct *jpeg) {
  const jpeg_component_info *parts = jpeg->comp_info;
  if (jpeg->num_components == 1) return 1;
  for (int i = 1; i < jpeg->num_components; i++)
    if (parts[i].h_samp_factor != 1 || parts[i].v_samp_factor != 1) return 0;
  return parts[0].h_samp_factor <= 2 && parts[0].v_samp_factor <= parts[0].h_samp_factor;
}

/* As fmcv_resize, of the window (left, top, width, height) of a JPEG that is reduced by `factor` (1, 2, 4, 8). */
int fmcv_crop_jpeg(const uint8_t *data, size_t bytes, int factor, const int *window, const double *box, int filter,
                   int out_height, int out_width, uint8_t *out) {
  struct jpeg_decompress_struct jpeg;
  Errors errors;
  uint8_t *volatile rows = NULL;
  volatile int status = REFUSED;
  int left = window[0], top = window[1], width = window[2], height = window[3];
  memset(&jpeg, 0, sizeof(jpeg));
  jpeg.err = jpeg_std_error(&errors.base);
  errors.base.error_exit = refuse;
  errors.base.emit_message = say_nothing;
  if (setjmp(errors.refused)) goto end;
  jpeg_create_decompress(&jpeg);
  jpeg_mem_src(&jpeg, (unsigned char *)data, bytes);
  jpeg_read_header(&jpeg, TRUE);
  if (!common_sampling(&jpeg)) goto end;
  jpeg.out_color_space = JCS_RGB;
  jpeg.scale_num = 1;
  jpeg.scale_denom = factor;
  jpeg_start_decompress(&jpeg);
  if (left < 0 || top < 0 || width < 1 || height < 1 || left + width > (int)jpeg.output_width ||
      top + height > (int)jpeg.output_height)
    goto end;
  /* At the edges of what is decoded, colors are interpolated without their neighbors: so with a column more. */
  JDIMENSION from = left > 0 ? left - 1 : 0, across = jpeg.output_width - from;
  if ((int)across > left + width + 1 - (int)from) across = left + width + 1 - from;
  if (from > 0 || across < jpeg.output_width) jpeg_crop_scanline(&jpeg, &from, &across);
  if (top > 0) jpeg_skip_scanlines(&jpeg, top);
  size_t stride = 3 * (size_t)across;
  rows = malloc(stride * height);
  if (!rows) {
    status = NO_MEMORY;
    goto end;
  }
  for (int y = 0; y < height;) {
    JSAMPROW row = rows + y * stride;
    y += jpeg_read_scanlines(&jpeg, &row, 1);
  }
  status = fmcv_resize(rows + 3 * (left - from), stride, width, height, box, filter, out_height,
                       out_width, out);
end:
  free(rows);
  jpeg_destroy_decompress(&jpeg);
  return status;
}

int fmcv_runs_here(void) {
  return __builtin_cpu_supports("avx2") ? 1 : 0;
}
