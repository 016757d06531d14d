export class CommandForm {
  constructor() {
    this.root = document.createElement("div");
  }

  open() {}
}
