	.file	"<string>"
	.section	.rodata.cst4,"aM",@progbits,4
	.p2align	2, 0x0
.LCPI0_0:
	.long	0x4b400000
.LCPI0_1:
	.long	0xcb400000
	.section	.ltext,"axl",@progbits
	.globl	_ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE
	.p2align	4
	.type	_ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE,@function
_ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE:
	.cfi_startproc
	pushq	%rbx
	.cfi_def_cfa_offset 16
	subq	$32, %rsp
	.cfi_def_cfa_offset 48
	.cfi_offset %rbx, -16
	movabsq	$.LCPI0_0, %r10
	movabsq	$.LCPI0_1, %r11
	movq	176(%rsp), %rcx
	movq	128(%rsp), %rdx
	movq	56(%rsp), %rsi
	movq	48(%rsp), %r8
	movl	$2, %eax
	xorl	%r9d, %r9d
	vmovss	(%r10), %xmm7
	vmovss	(%r11), %xmm3
	.p2align	4
.LBB0_1:
	vmovss	(%rcx,%r9,4), %xmm4
	movl	$17, %r10d
	vxorps	%xmm2, %xmm2, %xmm2
	movq	%rdx, %r11
	vmovss	%xmm2, -68(%rsp)
	vmovss	%xmm2, -64(%rsp)
	vmovss	%xmm2, -60(%rsp)
	vmovss	%xmm2, -56(%rsp)
	vmovss	%xmm2, -52(%rsp)
	vmovss	%xmm2, -48(%rsp)
	vxorps	%xmm15, %xmm15, %xmm15
	vxorps	%xmm14, %xmm14, %xmm14
	vxorps	%xmm13, %xmm13, %xmm13
	vxorps	%xmm12, %xmm12, %xmm12
	vxorps	%xmm11, %xmm11, %xmm11
	vxorps	%xmm10, %xmm10, %xmm10
	vxorps	%xmm9, %xmm9, %xmm9
	vxorps	%xmm8, %xmm8, %xmm8
	vxorps	%xmm5, %xmm5, %xmm5
	vmovss	%xmm4, 24(%rsp)
	vmovss	4(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, 20(%rsp)
	vmovss	8(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, 16(%rsp)
	vmovss	12(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, 12(%rsp)
	vmovss	16(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, 8(%rsp)
	vmovss	20(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, 4(%rsp)
	vmovss	24(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, (%rsp)
	vmovss	28(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, -4(%rsp)
	vmovss	32(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, -8(%rsp)
	vmovss	36(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, -12(%rsp)
	vmovss	40(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, -16(%rsp)
	vmovss	44(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, -20(%rsp)
	vmovss	48(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, -24(%rsp)
	vmovss	52(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, -28(%rsp)
	vmovss	56(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, -32(%rsp)
	vmovss	60(%rcx,%r9,4), %xmm4
	vmovss	%xmm4, -36(%rsp)
	vxorps	%xmm4, %xmm4, %xmm4
	vmovss	%xmm4, -44(%rsp)
	vmovss	%xmm4, -128(%rsp)
	vmovss	%xmm4, -124(%rsp)
	vmovss	%xmm4, -120(%rsp)
	vmovss	%xmm4, -116(%rsp)
	vmovss	%xmm4, -112(%rsp)
	vmovss	%xmm4, -108(%rsp)
	vmovss	%xmm4, -104(%rsp)
	vmovss	%xmm4, -100(%rsp)
	vmovss	%xmm4, -96(%rsp)
	vmovss	%xmm4, -92(%rsp)
	vmovss	%xmm4, -88(%rsp)
	vmovss	%xmm4, -84(%rsp)
	vmovss	%xmm4, -80(%rsp)
	vmovss	%xmm4, -76(%rsp)
	vmovss	%xmm4, -72(%rsp)
	.p2align	4
.LBB0_2:
	movq	%r11, %rbx
	sarq	$63, %rbx
	vmovss	%xmm5, 28(%rsp)
	vmovss	%xmm2, -40(%rsp)
	vmovss	-68(%rsp), %xmm2
	decq	%r10
	andq	%rsi, %rbx
	leaq	(%r8,%rbx,4), %rbx
	vmovss	(%rbx,%r11,4), %xmm4
	incq	%r11
	vmulss	24(%rsp), %xmm4, %xmm5
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm6, %xmm2, %xmm2
	vmovss	%xmm2, -68(%rsp)
	vmovss	-128(%rsp), %xmm2
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	20(%rsp), %xmm4, %xmm5
	vmovss	%xmm2, -128(%rsp)
	vmovss	-64(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm6, %xmm2, %xmm2
	vmovss	%xmm2, -64(%rsp)
	vmovss	-124(%rsp), %xmm2
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	16(%rsp), %xmm4, %xmm5
	vmovss	%xmm2, -124(%rsp)
	vmovss	-60(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm6, %xmm2, %xmm2
	vmovss	%xmm2, -60(%rsp)
	vmovss	-120(%rsp), %xmm2
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	12(%rsp), %xmm4, %xmm5
	vmovss	%xmm2, -120(%rsp)
	vmovss	-56(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm6, %xmm2, %xmm2
	vmovss	%xmm2, -56(%rsp)
	vmovss	-116(%rsp), %xmm2
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	8(%rsp), %xmm4, %xmm5
	vmovss	%xmm2, -116(%rsp)
	vmovss	-52(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm6, %xmm2, %xmm2
	vmovss	%xmm2, -52(%rsp)
	vmovss	-112(%rsp), %xmm2
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	4(%rsp), %xmm4, %xmm5
	vmovss	%xmm2, -112(%rsp)
	vmovss	-48(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm6, %xmm2, %xmm2
	vmovss	%xmm2, -48(%rsp)
	vmovss	-108(%rsp), %xmm2
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	(%rsp), %xmm4, %xmm5
	vmovss	%xmm2, -108(%rsp)
	vmovss	-104(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	-4(%rsp), %xmm4, %xmm5
	vaddss	%xmm6, %xmm15, %xmm15
	vmovss	%xmm2, -104(%rsp)
	vmovss	-100(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	-8(%rsp), %xmm4, %xmm5
	vaddss	%xmm6, %xmm14, %xmm14
	vmovss	%xmm2, -100(%rsp)
	vmovss	-96(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	-12(%rsp), %xmm4, %xmm5
	vaddss	%xmm6, %xmm13, %xmm13
	vmovss	%xmm2, -96(%rsp)
	vmovss	-92(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	-16(%rsp), %xmm4, %xmm5
	vaddss	%xmm6, %xmm12, %xmm12
	vmovss	%xmm2, -92(%rsp)
	vmovss	-88(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	-20(%rsp), %xmm4, %xmm5
	vaddss	%xmm6, %xmm11, %xmm11
	vmovss	%xmm2, -88(%rsp)
	vmovss	-84(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	-24(%rsp), %xmm4, %xmm5
	vaddss	%xmm6, %xmm10, %xmm10
	vmovss	%xmm2, -84(%rsp)
	vmovss	-80(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	-28(%rsp), %xmm4, %xmm5
	vaddss	%xmm6, %xmm9, %xmm9
	vmovss	%xmm2, -80(%rsp)
	vmovss	-76(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	-32(%rsp), %xmm4, %xmm5
	vaddss	%xmm6, %xmm8, %xmm8
	vmovss	%xmm2, -76(%rsp)
	vmovaps	%xmm15, %xmm2
	vmovaps	%xmm14, %xmm15
	vmovaps	%xmm13, %xmm14
	vmovaps	%xmm12, %xmm13
	vmovaps	%xmm11, %xmm12
	vmovaps	%xmm10, %xmm11
	vmovaps	%xmm9, %xmm10
	vmovaps	%xmm8, %xmm9
	vmovss	-44(%rsp), %xmm8
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm5
	vaddss	%xmm6, %xmm8, %xmm8
	vmovss	%xmm8, -44(%rsp)
	vmovaps	%xmm9, %xmm8
	vmovaps	%xmm10, %xmm9
	vmovaps	%xmm11, %xmm10
	vmovaps	%xmm12, %xmm11
	vmovaps	%xmm13, %xmm12
	vmovaps	%xmm14, %xmm13
	vmovaps	%xmm15, %xmm14
	vmovaps	%xmm2, %xmm15
	vmovss	-72(%rsp), %xmm2
	vaddss	%xmm5, %xmm2, %xmm2
	vmulss	-36(%rsp), %xmm4, %xmm5
	vmovss	%xmm2, -72(%rsp)
	vmovss	-40(%rsp), %xmm2
	vmaxss	%xmm5, %xmm0, %xmm5
	vminss	%xmm5, %xmm1, %xmm5
	vaddss	%xmm7, %xmm5, %xmm5
	vaddss	%xmm3, %xmm5, %xmm5
	vmulss	%xmm5, %xmm5, %xmm6
	vmulss	%xmm5, %xmm4, %xmm4
	vmovss	28(%rsp), %xmm5
	vaddss	%xmm6, %xmm2, %xmm2
	vmovss	%xmm2, -40(%rsp)
	vmovss	-40(%rsp), %xmm2
	vaddss	%xmm4, %xmm5, %xmm5
	cmpq	$1, %r10
	ja	.LBB0_2
	vmovss	-68(%rsp), %xmm4
	vmovss	-108(%rsp), %xmm6
	subq	$1, %rax
	vmovss	%xmm4, 384(%rcx,%r9,4)
	vmovss	-128(%rsp), %xmm4
	vmovss	%xmm4, 512(%rcx,%r9,4)
	vmovss	-64(%rsp), %xmm4
	vmovss	%xmm4, 388(%rcx,%r9,4)
	vmovss	-124(%rsp), %xmm4
	vmovss	%xmm4, 516(%rcx,%r9,4)
	vmovss	-60(%rsp), %xmm4
	vmovss	%xmm4, 392(%rcx,%r9,4)
	vmovss	-120(%rsp), %xmm4
	vmovss	%xmm4, 520(%rcx,%r9,4)
	vmovss	-56(%rsp), %xmm4
	vmovss	%xmm4, 396(%rcx,%r9,4)
	vmovss	-116(%rsp), %xmm4
	vmovss	%xmm4, 524(%rcx,%r9,4)
	vmovss	-52(%rsp), %xmm4
	vmovss	%xmm4, 400(%rcx,%r9,4)
	vmovss	-112(%rsp), %xmm4
	vmovss	%xmm4, 528(%rcx,%r9,4)
	vmovss	-48(%rsp), %xmm4
	vmovss	%xmm4, 404(%rcx,%r9,4)
	vmovss	%xmm6, 532(%rcx,%r9,4)
	vmovss	%xmm15, 408(%rcx,%r9,4)
	vmovss	-104(%rsp), %xmm15
	vmovss	-100(%rsp), %xmm6
	vmovss	%xmm15, 536(%rcx,%r9,4)
	vmovss	%xmm14, 412(%rcx,%r9,4)
	vmovss	%xmm6, 540(%rcx,%r9,4)
	vmovss	%xmm13, 416(%rcx,%r9,4)
	vmovss	-96(%rsp), %xmm13
	vmovss	-92(%rsp), %xmm6
	vmovss	%xmm13, 544(%rcx,%r9,4)
	vmovss	%xmm12, 420(%rcx,%r9,4)
	vmovss	%xmm6, 548(%rcx,%r9,4)
	vmovss	%xmm11, 424(%rcx,%r9,4)
	vmovss	-88(%rsp), %xmm11
	vmovss	-84(%rsp), %xmm6
	vmovss	%xmm11, 552(%rcx,%r9,4)
	vmovss	%xmm10, 428(%rcx,%r9,4)
	vmovss	%xmm6, 556(%rcx,%r9,4)
	vmovss	%xmm9, 432(%rcx,%r9,4)
	vmovss	-80(%rsp), %xmm9
	vmovss	-76(%rsp), %xmm6
	vmovss	%xmm9, 560(%rcx,%r9,4)
	vmovss	%xmm8, 436(%rcx,%r9,4)
	vmovss	%xmm6, 564(%rcx,%r9,4)
	vmovss	-44(%rsp), %xmm8
	vmovss	-72(%rsp), %xmm6
	vmovss	%xmm8, 440(%rcx,%r9,4)
	vmovss	%xmm6, 568(%rcx,%r9,4)
	vmovss	%xmm2, 444(%rcx,%r9,4)
	vmovss	%xmm5, 572(%rcx,%r9,4)
	leaq	16(%r9), %r9
	ja	.LBB0_1
	movq	$0, (%rdi)
	xorl	%eax, %eax
	addq	$32, %rsp
	.cfi_def_cfa_offset 16
	popq	%rbx
	.cfi_def_cfa_offset 8
	retq
.Lfunc_end0:
	.size	_ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE, .Lfunc_end0-_ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE
	.cfi_endproc

	.globl	_ZN7cpython8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE
	.p2align	4
	.type	_ZN7cpython8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE,@function
_ZN7cpython8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE:
	.cfi_startproc
	pushq	%rbp
	.cfi_def_cfa_offset 16
	pushq	%r15
	.cfi_def_cfa_offset 24
	pushq	%r14
	.cfi_def_cfa_offset 32
	pushq	%r13
	.cfi_def_cfa_offset 40
	pushq	%r12
	.cfi_def_cfa_offset 48
	pushq	%rbx
	.cfi_def_cfa_offset 56
	subq	$296, %rsp
	.cfi_def_cfa_offset 352
	.cfi_offset %rbx, -56
	.cfi_offset %r12, -48
	.cfi_offset %r13, -40
	.cfi_offset %r14, -32
	.cfi_offset %r15, -24
	.cfi_offset %rbp, -16
	movq	%rsi, %rdi
	subq	$8, %rsp
	.cfi_adjust_cfa_offset 8
	leaq	64(%rsp), %r10
	xorl	%ebx, %ebx
	leaq	72(%rsp), %r11
	leaq	80(%rsp), %r14
	leaq	88(%rsp), %r15
	leaq	96(%rsp), %r12
	movabsq	$.const.scan_sym, %rsi
	movabsq	$PyArg_UnpackTuple, %r13
	leaq	112(%rsp), %r8
	leaq	104(%rsp), %r9
	movl	$7, %edx
	movl	$7, %ecx
	xorl	%eax, %eax
	pushq	%r10
	.cfi_adjust_cfa_offset 8
	pushq	%r11
	.cfi_adjust_cfa_offset 8
	pushq	%r14
	.cfi_adjust_cfa_offset 8
	pushq	%r15
	.cfi_adjust_cfa_offset 8
	pushq	%r12
	.cfi_adjust_cfa_offset 8
	callq	*%r13
	addq	$48, %rsp
	.cfi_adjust_cfa_offset -48
	vxorps	%xmm0, %xmm0, %xmm0
	vmovups	%ymm0, 112(%rsp)
	vmovups	%ymm0, 136(%rsp)
	testl	%eax, %eax
	je	.LBB1_17
	movabsq	$_ZN08NumbaEnv8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE, %rax
	cmpq	$0, (%rax)
	je	.LBB1_22
	movq	104(%rsp), %rdi
	movabsq	$NRT_adapt_ndarray_from_python, %r12
	leaq	176(%rsp), %rsi
	vmovups	%ymm0, 176(%rsp)
	vmovups	%ymm0, 200(%rsp)
	vzeroupper
	callq	*%r12
	testl	%eax, %eax
	jne	.LBB1_23
	cmpq	$4, 200(%rsp)
	jne	.LBB1_23
	movq	96(%rsp), %rdi
	movq	176(%rsp), %rbx
	movq	208(%rsp), %r14
	movq	216(%rsp), %r15
	leaq	240(%rsp), %rsi
	vxorps	%xmm0, %xmm0, %xmm0
	vmovups	%ymm0, 240(%rsp)
	vmovups	%ymm0, 264(%rsp)
	vzeroupper
	callq	*%r12
	testl	%eax, %eax
	jne	.LBB1_24
	cmpq	$4, 264(%rsp)
	jne	.LBB1_24
	movq	240(%rsp), %rax
	movq	88(%rsp), %rdi
	movq	%rbx, 32(%rsp)
	movabsq	$PyNumber_Long, %rbx
	movq	%r15, 40(%rsp)
	movq	%rax, 24(%rsp)
	callq	*%rbx
	movabsq	$PyLong_AsLongLong, %r13
	movabsq	$Py_DecRef, %rbp
	movq	%r14, 48(%rsp)
	testq	%rax, %rax
	je	.LBB1_25
	movq	%rax, %rdi
	movq	%rax, %r12
	callq	*%r13
	movq	%r12, %rdi
	movq	%rax, %r15
	callq	*%rbp
	movabsq	$PyErr_Occurred, %r14
	callq	*%r14
	testq	%rax, %rax
	jne	.LBB1_27
.LBB1_8:
	movq	80(%rsp), %rdi
	callq	*%rbx
	testq	%rax, %rax
	je	.LBB1_10
	movq	%rax, %rdi
	movq	%rax, %r12
	callq	*%r13
	movq	%r12, %rdi
	callq	*%rbp
.LBB1_10:
	callq	*%r14
	testq	%rax, %rax
	jne	.LBB1_27
	movq	72(%rsp), %rdi
	movabsq	$PyNumber_Float, %rbx
	callq	*%rbx
	movabsq	$PyFloat_AsDouble, %r13
	movq	%rax, %rdi
	movq	%rax, %r12
	callq	*%r13
	movq	%r12, %rdi
	vmovsd	%xmm0, 16(%rsp)
	callq	*%rbp
	callq	*%r14
	testq	%rax, %rax
	jne	.LBB1_27
	movq	64(%rsp), %rdi
	callq	*%rbx
	movq	%rax, %rdi
	movq	%rax, %r12
	callq	*%r13
	movq	%r12, %rdi
	vmovsd	%xmm0, 8(%rsp)
	callq	*%rbp
	callq	*%r14
	testq	%rax, %rax
	jne	.LBB1_27
	movq	56(%rsp), %rdi
	leaq	112(%rsp), %rsi
	movabsq	$NRT_adapt_ndarray_from_python, %rax
	vxorps	%xmm0, %xmm0, %xmm0
	vmovups	%ymm0, 112(%rsp)
	vmovups	%ymm0, 136(%rsp)
	vzeroupper
	callq	*%rax
	testl	%eax, %eax
	jne	.LBB1_26
	cmpq	$4, 136(%rsp)
	jne	.LBB1_26
	vmovsd	16(%rsp), %xmm0
	movq	112(%rsp), %r12
	movq	144(%rsp), %rbx
	movabsq	$PyEval_SaveThread, %rax
	vcvtsd2ss	%xmm0, %xmm0, %xmm0
	vmovss	%xmm0, 16(%rsp)
	vmovsd	8(%rsp), %xmm0
	vcvtsd2ss	%xmm0, %xmm0, %xmm0
	vmovss	%xmm0, 8(%rsp)
	callq	*%rax
	movq	%rax, %r13
	subq	$160, %rsp
	.cfi_adjust_cfa_offset 160
	vmovss	176(%rsp), %xmm0
	vmovss	168(%rsp), %xmm1
	movq	200(%rsp), %rax
	movq	208(%rsp), %rdx
	movq	192(%rsp), %r14
	leaq	392(%rsp), %rdi
	movq	%rbx, 128(%rsp)
	movq	%r12, 96(%rsp)
	movq	%r15, 80(%rsp)
	movq	%rax, 8(%rsp)
	movabsq	$_ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE, %rax
	movq	%rdx, (%rsp)
	movq	%r14, %rdx
	callq	*%rax
	addq	$160, %rsp
	.cfi_adjust_cfa_offset -160
	movabsq	$PyEval_RestoreThread, %r15
	movq	%r13, %rdi
	movl	%eax, %ebp
	callq	*%r15
	movabsq	$NRT_decref, %rbx
	movq	%r14, %rdi
	callq	*%rbx
	movq	24(%rsp), %rdi
	callq	*%rbx
	movq	%r12, %rdi
	callq	*%rbx
	testl	%ebp, %ebp
	jne	.LBB1_18
	movabsq	$_Py_NoneStruct, %rbx
	movabsq	$Py_IncRef, %rax
	movq	%rbx, %rdi
	callq	*%rax
.LBB1_17:
	movq	%rbx, %rax
	addq	$296, %rsp
	.cfi_def_cfa_offset 56
	popq	%rbx
	.cfi_def_cfa_offset 48
	popq	%r12
	.cfi_def_cfa_offset 40
	popq	%r13
	.cfi_def_cfa_offset 32
	popq	%r14
	.cfi_def_cfa_offset 24
	popq	%r15
	.cfi_def_cfa_offset 16
	popq	%rbp
	.cfi_def_cfa_offset 8
	vzeroupper
	retq
.LBB1_18:
	.cfi_def_cfa_offset 352
	jg	.LBB1_33
	cmpl	$-1, %ebp
	je	.LBB1_30
	cmpl	$-3, %ebp
	jne	.LBB1_31
	movabsq	$PyExc_StopIteration, %rdi
	movabsq	$PyErr_SetNone, %rax
	jmp	.LBB1_29
.LBB1_22:
	movabsq	$PyExc_RuntimeError, %rdi
	movabsq	$".const.missing Environment: _ZN08NumbaEnv8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE", %rsi
	jmp	.LBB1_32
.LBB1_23:
	movabsq	$PyExc_TypeError, %rdi
	movabsq	$".const.can't unbox array from PyObject into native value.  The object maybe of a different type", %rsi
	jmp	.LBB1_32
.LBB1_24:
	movabsq	$PyExc_TypeError, %rdi
	movabsq	$".const.can't unbox array from PyObject into native value.  The object maybe of a different type", %rsi
	movabsq	$PyErr_SetString, %rax
	callq	*%rax
	jmp	.LBB1_28
.LBB1_25:
	xorl	%r15d, %r15d
	movabsq	$PyErr_Occurred, %r14
	callq	*%r14
	testq	%rax, %rax
	je	.LBB1_8
	jmp	.LBB1_27
.LBB1_26:
	movabsq	$PyExc_TypeError, %rdi
	movabsq	$".const.can't unbox array from PyObject into native value.  The object maybe of a different type", %rsi
	movabsq	$PyErr_SetString, %rax
	callq	*%rax
.LBB1_27:
	movq	24(%rsp), %rdi
	movabsq	$NRT_decref, %rax
	callq	*%rax
	movq	32(%rsp), %rbx
.LBB1_28:
	movabsq	$NRT_decref, %rax
	movq	%rbx, %rdi
.LBB1_29:
	callq	*%rax
.LBB1_30:
	xorl	%ebx, %ebx
	jmp	.LBB1_17
.LBB1_31:
	movabsq	$PyExc_SystemError, %rdi
	movabsq	$".const.unknown error when calling native function", %rsi
.LBB1_32:
	movabsq	$PyErr_SetString, %rax
	vzeroupper
	callq	*%rax
	xorl	%ebx, %ebx
	jmp	.LBB1_17
.LBB1_33:
	movabsq	$PyErr_Clear, %rax
	callq	*%rax
.Lfunc_end1:
	.size	_ZN7cpython8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE, .Lfunc_end1-_ZN7cpython8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE
	.cfi_endproc

	.globl	cfunc._ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE
	.p2align	4
	.type	cfunc._ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE,@function
cfunc._ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE:
	.cfi_startproc
	pushq	%r14
	.cfi_def_cfa_offset 16
	pushq	%rbx
	.cfi_def_cfa_offset 24
	subq	$168, %rsp
	.cfi_def_cfa_offset 192
	.cfi_offset %rbx, -24
	.cfi_offset %r14, -16
	movq	256(%rsp), %rax
	movq	272(%rsp), %rcx
	movq	304(%rsp), %rsi
	movq	%rdi, %rdx
	leaq	160(%rsp), %rdi
	movq	$0, 160(%rsp)
	movq	%r9, 8(%rsp)
	movq	%r8, (%rsp)
	movq	%rax, 80(%rsp)
	movabsq	$_ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE, %rax
	movq	%rsi, 128(%rsp)
	movq	%rcx, 96(%rsp)
	callq	*%rax
	movq	160(%rsp), %rcx
	movl	$0, 156(%rsp)
	testl	%eax, %eax
	jne	.LBB2_1
.LBB2_5:
	movq	%rcx, %rax
	addq	$168, %rsp
	.cfi_def_cfa_offset 24
	popq	%rbx
	.cfi_def_cfa_offset 16
	popq	%r14
	.cfi_def_cfa_offset 8
	retq
.LBB2_1:
	.cfi_def_cfa_offset 192
	movq	%rcx, %r14
	movabsq	$numba_gil_ensure, %rcx
	leaq	156(%rsp), %rdi
	movl	%eax, %ebx
	callq	*%rcx
	testl	%ebx, %ebx
	jg	.LBB2_2
	movl	%ebx, %eax
	cmpl	$-1, %ebx
	je	.LBB2_4
	cmpl	$-3, %eax
	jne	.LBB2_3
	movabsq	$PyExc_StopIteration, %rdi
	movabsq	$PyErr_SetNone, %rax
	callq	*%rax
	jmp	.LBB2_4
.LBB2_3:
	movabsq	$PyExc_SystemError, %rdi
	movabsq	$".const.unknown error when calling native function.2", %rsi
	movabsq	$PyErr_SetString, %rax
	callq	*%rax
.LBB2_4:
	movabsq	$".const.<numba.core.cpu.CPUContext>", %rdi
	movabsq	$PyUnicode_FromString, %rax
	callq	*%rax
	movq	%rax, %rbx
	movabsq	$PyErr_WriteUnraisable, %rax
	movq	%rbx, %rdi
	callq	*%rax
	movabsq	$Py_DecRef, %rax
	movq	%rbx, %rdi
	callq	*%rax
	movabsq	$numba_gil_release, %rax
	leaq	156(%rsp), %rdi
	callq	*%rax
	movq	%r14, %rcx
	jmp	.LBB2_5
.LBB2_2:
	movabsq	$PyErr_Clear, %rax
	callq	*%rax
.Lfunc_end2:
	.size	cfunc._ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE, .Lfunc_end2-cfunc._ZN8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE
	.cfi_endproc

	.weak	NRT_incref
	.p2align	4
	.type	NRT_incref,@function
NRT_incref:
	testq	%rdi, %rdi
	je	.LBB3_2
	lock		incq	(%rdi)
.LBB3_2:
	retq
.Lfunc_end3:
	.size	NRT_incref, .Lfunc_end3-NRT_incref

	.weak	NRT_decref
	.p2align	4
	.type	NRT_decref,@function
NRT_decref:
	.cfi_startproc
	testq	%rdi, %rdi
	je	.LBB4_2
	#MEMBARRIER
	lock		decq	(%rdi)
	je	.LBB4_3
.LBB4_2:
	retq
.LBB4_3:
	movabsq	$NRT_MemInfo_call_dtor, %rax
	#MEMBARRIER
	jmpq	*%rax
.Lfunc_end4:
	.size	NRT_decref, .Lfunc_end4-NRT_decref
	.cfi_endproc

	.type	.const.scan_sym,@object
	.section	.lrodata,"al",@progbits
.const.scan_sym:
	.asciz	"scan_sym"
	.size	.const.scan_sym, 9

	.type	_ZN08NumbaEnv8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE,@object
	.comm	_ZN08NumbaEnv8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE,8,8
	.type	".const.missing Environment: _ZN08NumbaEnv8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE",@object
	.p2align	4, 0x0
".const.missing Environment: _ZN08NumbaEnv8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE":
	.asciz	"missing Environment: _ZN08NumbaEnv8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE"
	.size	".const.missing Environment: _ZN08NumbaEnv8__main__8scan_symB2v7B56c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAK4JJIqUWsIgmAA_3d_3dE5ArrayIfLi1E1C7mutable7alignedE5ArrayIfLi1E1C7mutable7alignedEx24Literal_5bint_5d_2816_29ff5ArrayIfLi1E1C7mutable7alignedE", 239

	.type	".const.can't unbox array from PyObject into native value.  The object maybe of a different type",@object
	.p2align	4, 0x0
".const.can't unbox array from PyObject into native value.  The object maybe of a different type":
	.asciz	"can't unbox array from PyObject into native value.  The object maybe of a different type"
	.size	".const.can't unbox array from PyObject into native value.  The object maybe of a different type", 89

	.type	".const.unknown error when calling native function",@object
	.p2align	4, 0x0
".const.unknown error when calling native function":
	.asciz	"unknown error when calling native function"
	.size	".const.unknown error when calling native function", 43

	.type	".const.unknown error when calling native function.2",@object
	.p2align	4, 0x0
".const.unknown error when calling native function.2":
	.asciz	"unknown error when calling native function"
	.size	".const.unknown error when calling native function.2", 43

	.type	".const.<numba.core.cpu.CPUContext>",@object
	.p2align	4, 0x0
".const.<numba.core.cpu.CPUContext>":
	.asciz	"<numba.core.cpu.CPUContext>"
	.size	".const.<numba.core.cpu.CPUContext>", 28

	.type	_ZN08NumbaEnv5numba2np8arrayobj11impl_carray12_3clocals_3e4implB2v3B54c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAw4hWqFpgsIBZmgA_3dE10float32_2a8UniTupleIxLi1EE27omitted_28default_3dNone_29,@object
	.comm	_ZN08NumbaEnv5numba2np8arrayobj11impl_carray12_3clocals_3e4implB2v3B54c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAw4hWqFpgsIBZmgA_3dE10float32_2a8UniTupleIxLi1EE27omitted_28default_3dNone_29,8,8
	.type	_ZN08NumbaEnv5numba7cpython8builtins6ol_max12_3clocals_3e4implB2v4B54c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAw4hWqFpgsIBZmgA_3dE15StarArgUniTupleIfLi2EE,@object
	.comm	_ZN08NumbaEnv5numba7cpython8builtins6ol_max12_3clocals_3e4implB2v4B54c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAw4hWqFpgsIBZmgA_3dE15StarArgUniTupleIfLi2EE,8,8
	.type	_ZN08NumbaEnv5numba7cpython8builtins6ol_min12_3clocals_3e4implB2v5B54c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAw4hWqFpgsIBZmgA_3dE15StarArgUniTupleIfLi2EE,@object
	.comm	_ZN08NumbaEnv5numba7cpython8builtins6ol_min12_3clocals_3e4implB2v5B54c8tJTIeFIjxB2IKSgI4CrvQCk0Z4yRYcWsBAw4hWqFpgsIBZmgA_3dE15StarArgUniTupleIfLi2EE,8,8
	.section	".note.GNU-stack","",@progbits
