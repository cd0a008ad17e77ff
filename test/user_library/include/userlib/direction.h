// How affine reads its weight: a header of the user's own, found through OpLibrary(include=...).
#pragma once

namespace userlib {

enum Direction { straight, reverse };

}  // namespace userlib
