from sasa_train.visualize import main

main()
