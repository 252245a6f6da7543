// The library's matcher behind the function of a "plugmesh.matcher.v1" capsule: calls through the C interface of tvm-ffi, without Python.
#include <tvm/ffi/c_api.h>

#include <cstdint>

namespace {

enum Op { ACCEPT = 0, STANDING = 1, FILL = 2, FORCED = 3 };

}  // namespace

// Filled in by native.py; the layouts must agree.
struct Library {
  int (*call)(TVMFFIObjectHandle, TVMFFIAny*, int32_t, TVMFFIAny*);
  void (*take_error)(TVMFFIObjectHandle*);
  int (*release)(TVMFFIObjectHandle);
  TVMFFIObjectHandle accept, fill, is_completed, is_terminated, forced;  // methods
  const uint8_t* known;                                                  // byte i is 1 where token i is text or an end
  int64_t num_known, num_words;
};

struct State {
  const Library* library;
  TVMFFIObject* matcher;
};

namespace {

TVMFFIAny integer(int64_t value) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIInt;
  any.v_int64 = value;
  return any;
}

TVMFFIAny boolean(bool value) {
  TVMFFIAny any{};
  any.type_index = kTVMFFIBool;
  any.v_int64 = value;
  return any;
}

// The method's result; false when it raised.
template <int N>
bool call(const State& s, TVMFFIObjectHandle method, const TVMFFIAny (&more)[N], int num, TVMFFIAny* result) {
  TVMFFIAny args[N + 1];
  args[0] = {};
  args[0].type_index = s.matcher->type_index;
  args[0].v_obj = s.matcher;
  for (int i = 0; i < num; ++i) args[i + 1] = more[i];
  *result = {};
  if (s.library->call(method, args, num + 1, result) == 0) return true;
  TVMFFIObjectHandle error = nullptr;
  s.library->take_error(&error);
  if (error != nullptr) s.library->release(error);
  return false;
}

int ask(const State& s, TVMFFIObjectHandle method) {
  TVMFFIAny none[1] = {};
  TVMFFIAny result;
  return call(s, method, none, 0, &result) && result.type_index == kTVMFFIBool ? result.v_int64 != 0 : -1;
}

int accept(const State& s, int32_t token) {
  if (token < 0 || token >= s.library->num_known || !s.library->known[token]) return 0;
  const int over = ask(s, s.library->is_terminated);
  if (over != 0) return over < 0 ? -1 : 0;
  const TVMFFIAny args[2] = {integer(token), boolean(false)};
  TVMFFIAny result;
  return call(s, s.library->accept, args, 2, &result) && result.type_index == kTVMFFIBool ? result.v_int64 != 0 : -1;
}

int standing(const State& s) {
  const int over = ask(s, s.library->is_terminated);
  if (over != 0) return over < 0 ? -1 : 3;
  return ask(s, s.library->is_completed);
}

int fill(const State& s, uint32_t* mask) {
  const int over = ask(s, s.library->is_terminated);
  if (over < 0) return -1;
  const int64_t words = s.library->num_words;
  if (over) {
    for (int64_t i = 0; i < words; ++i) mask[i] = 0;
    return 1;
  }
  int64_t shape[1] = {words}, strides[1] = {1};
  DLTensor tensor{};
  tensor.data = mask;
  tensor.device = {kDLCPU, 0};
  tensor.ndim = 1;
  tensor.dtype = {kDLInt, 32, 1};
  tensor.shape = shape;
  tensor.strides = strides;
  TVMFFIAny args[3] = {{}, integer(0), boolean(false)};
  args[0].type_index = kTVMFFIDLTensorPtr;
  args[0].v_ptr = &tensor;
  TVMFFIAny result;
  if (!call(s, s.library->fill, args, 3, &result) || result.type_index != kTVMFFIBool) return -1;
  if (const int64_t rest = s.library->num_known % 32; rest != 0) mask[words - 1] &= (uint32_t(1) << rest) - 1;  // what is beyond the logits it leaves as it comes
  return result.v_int64 != 0;
}

int forced(const State& s) {
  const int over = ask(s, s.library->is_terminated);
  if (over != 0) return over < 0 ? -1 : 0;
  TVMFFIAny none[1] = {}, result;
  if (!call(s, s.library->forced, none, 0, &result)) return -1;
  if (result.type_index == kTVMFFISmallStr) return result.small_str_len != 0;
  if (result.type_index != kTVMFFIStr) return -1;
  const bool is_any = reinterpret_cast<const TVMFFIByteArray*>(result.v_obj + 1)->size != 0;  // follows the object's header
  s.library->release(result.v_obj);
  return is_any;
}

}  // namespace

extern "C" int plugmesh_xgrammar_matcher(void* state, int op, int32_t token, uint32_t* mask) {
  const State& s = *static_cast<const State*>(state);
  switch (op) {
    case ACCEPT: return accept(s, token);
    case STANDING: return standing(s);
    case FILL: return fill(s, mask);
    case FORCED: return forced(s);
    default: return -1;
  }
}
